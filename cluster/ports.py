"""Which ports a local cluster may use, agreed between clusters of one machine.

Ray Serve and HAProxy bind with SO_REUSEPORT, so two clusters that pick the same port would both
succeed and then steal each other's connections. Every cluster therefore holds file locks on what
it uses: one on a block of ports, one on each port named by the configuration. The kernel releases
a lock when its holder dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import ClusterStartError, ConfigError, PortInUseError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_BLOCK_SIZE = 64
_NUM_BLOCKS = 60
# Below 32768, where Linux begins to hand out ports of outgoing connections.
_HTTP_BASE = 20000
_GRPC_BASE = 26000
_NUM_SINGLE_PORTS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPorts:
    """The ports of one cluster.

    Attributes:
        http: where clients call the HTTP surface.
        grpc: where clients call the gRPC surface.
        metrics: Ray's Prometheus endpoint.
        haproxy_metrics: HAProxy's Prometheus endpoint.
        haproxy_stats: HAProxy's statistics page.
        fallback_http: Serve's Python proxy, which HAProxy asks while no replica is up.
        fallback_grpc: likewise for gRPC.
        replica_http: first and last port that ingress replicas listen on behind HAProxy.
        replica_grpc: likewise for gRPC.
    """

    http: int
    grpc: int
    metrics: int
    haproxy_metrics: int
    haproxy_stats: int
    fallback_http: int
    fallback_grpc: int
    replica_http: tuple[int, int]
    replica_grpc: tuple[int, int]


class PortLease:
    """Holds the ports of one cluster for as long as the context is open."""

    def __init__(self, lock_dir: Path, *, host: str, http: int, grpc: int, metrics: int) -> None:
        """Describe what is wanted.

        Args:
            lock_dir: folder shared by all clusters of this user.
            host: address that the HTTP and gRPC surfaces bind.
            http: configured port; 0 picks a free one.
            grpc: configured port; 0 picks a free one.
            metrics: configured port; 0 picks a free one.
        """
        self._lock_dir = lock_dir
        self._host = host
        self._http = http
        self._grpc = grpc
        self._metrics = metrics
        self._locks = ExitStack()

    def __enter__(self) -> ClusterPorts:
        """Take the ports.

        Raises:
            PortInUseError: a configured port is taken.
            ConfigError: a configured port cannot be bound at the host.
            ClusterStartError: no block of ports is free.
        """
        self._lock_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            return self._take()
        except BaseException:
            self._locks.close()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._locks.close()

    def _take(self) -> ClusterPorts:
        # Configured ports first: their error is the one a user can act upon.
        for port, setting in (
            (self._http, "server.http_port"),
            (self._grpc, "server.grpc_port"),
            (self._metrics, "server.metrics_port"),
        ):
            if port and not (self._lock(f"port-{port}") and _is_free(self._host, port)):
                raise PortInUseError(port, setting)
        block, free_ports = self._take_block()
        free = iter(free_ports)
        first_http = _HTTP_BASE + block * _BLOCK_SIZE + _NUM_SINGLE_PORTS
        first_grpc = _GRPC_BASE + block * _BLOCK_SIZE
        return ClusterPorts(
            http=self._http or next(free),
            grpc=self._grpc or next(free),
            metrics=self._metrics or next(free),
            haproxy_metrics=next(free),
            haproxy_stats=next(free),
            fallback_http=next(free),
            fallback_grpc=next(free),
            replica_http=(first_http, first_http + _BLOCK_SIZE - _NUM_SINGLE_PORTS - 1),
            replica_grpc=(first_grpc, first_grpc + _BLOCK_SIZE - 1),
        )

    def _take_block(self) -> tuple[int, list[int]]:
        # Not every cluster begins its search at the first block, so that ports of a cluster that
        # has just ended are not handed out at once to clients that still remember it.
        start = os.getpid()
        for offset in range(_NUM_BLOCKS):
            block = (start + offset) % _NUM_BLOCKS
            free = _free_ports(_HTTP_BASE + block * _BLOCK_SIZE)
            if len(free) == _NUM_SINGLE_PORTS and self._lock(f"block-{block}"):
                return block, free
        raise ClusterStartError("no free block of ports is left for another cluster")

    def _lock(self, name: str) -> bool:
        handle = self._locks.enter_context((self._lock_dir / f"{name}.lock").open("w"))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _free_ports(first: int) -> list[int]:
    return [port for port in range(first, first + _NUM_SINGLE_PORTS) if _is_free("", port)]


def _is_free(host: str, port: int) -> bool:
    """Whether nobody listens there; ports of connections that are just closing count as free."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # A listener on the wildcard address shows only when this socket listens as well.
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            where = f"server.host {host!r}: port {port} cannot be bound"
            raise ConfigError((f"{where}: {error.strerror}",)) from error
    return True
