"""Ports agreed between clusters of one machine."""

import socket
from contextlib import ExitStack

import pytest

from cluster.errors import ConfigError, PortInUseError
from cluster.ports import PortLease


def lease(folder, *, host="127.0.0.1", http=0, grpc=0, metrics=0) -> PortLease:
    return PortLease(folder, host=host, http=http, grpc=grpc, metrics=metrics)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ports_of(ports) -> set[int]:
    singles = {
        ports.http,
        ports.grpc,
        ports.metrics,
        ports.haproxy_metrics,
        ports.haproxy_stats,
        ports.fallback_http,
        ports.fallback_grpc,
    }
    http = range(ports.replica_http[0], ports.replica_http[1] + 1)
    grpc = range(ports.replica_grpc[0], ports.replica_grpc[1] + 1)
    assert len(singles) == 7
    assert not singles & {*http, *grpc}
    return singles | {*http} | {*grpc}


def test_many_clusters_share_no_port(tmp_path):
    with ExitStack() as stack:
        seen: set[int] = set()
        for _ in range(6):
            mine = ports_of(stack.enter_context(lease(tmp_path)))
            assert not mine & seen
            seen |= mine


def test_a_configured_port_is_used_as_it_is(tmp_path):
    port = free_port()
    with lease(tmp_path, grpc=port) as ports:
        assert ports.grpc == port


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])  # noqa: S104
@pytest.mark.parametrize("name", ["http", "grpc", "metrics"])
def test_a_listener_on_a_configured_port_is_noticed(tmp_path, name, address):
    with socket.socket() as holder:
        # As HAProxy and Ray Serve bind: a second listener with this option would be let in.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((address, 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(PortInUseError) as caught, lease(tmp_path, **{name: port}):
            pass
    assert caught.value.port == port
    assert caught.value.setting == f"server.{name}_port"


# No address of this machine, and none of IPv4; a name is not looked up without a network.
@pytest.mark.parametrize("host", ["192.0.2.1", "::1"])
def test_a_host_that_cannot_be_bound_is_no_port_in_use(tmp_path, host):
    with pytest.raises(ConfigError) as caught, lease(tmp_path, host=host, http=free_port()):
        pass
    assert f"server.host {host!r}: port " in str(caught.value)


def test_a_port_another_cluster_is_about_to_bind_is_taken(tmp_path):
    port = free_port()
    with lease(tmp_path, http=port), pytest.raises(PortInUseError), lease(tmp_path, grpc=port):
        pass


def test_everything_is_free_again_after_the_lease(tmp_path):
    port = free_port()
    for _ in range(2):
        with lease(tmp_path, http=port) as ports:
            assert ports.http == port


def test_a_refused_lease_holds_nothing(tmp_path):
    first, second = free_port(), free_port()
    with lease(tmp_path, grpc=second):
        with pytest.raises(PortInUseError), lease(tmp_path, http=first, grpc=second):
            pass
        with lease(tmp_path, http=first) as ports:
            assert ports.http == first
