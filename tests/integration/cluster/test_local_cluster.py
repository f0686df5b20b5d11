"""Life and death of a whole cluster, with a tiny application on real Ray, HAProxy and Valkey."""

import signal
import socket
from pathlib import Path

import httpx
import pytest

from cluster.config import ClusterConfig, ServerConfig
from cluster.errors import ClusterStartError, PortInUseError
from cluster.local_cluster import LocalCluster
from cluster.serve_app import ServedApp
from cluster.state import end_stale_clusters, list_states
from tests.integration.cluster.cluster_process import ClusterProcess, still_running

pytestmark = pytest.mark.integration

MODULE = ["-m", "tests.integration.cluster.trivial_app"]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("server: {http_port: 0, grpc_port: 0}\n")
    return path


@pytest.fixture
def start(tmp_path, config_file):
    started: list[ClusterProcess] = []

    def start_one() -> ClusterProcess:
        started.append(ClusterProcess([*MODULE, str(config_file)], tmp_path / "state"))
        return started[-1]

    yield start_one
    for one in started:
        one.kill()


def test_two_clusters_live_side_by_side_and_signals_stop_each_completely(start, tmp_path):
    pair = [start(), start()]
    states = [one.wait_for("READY") for one in pair]

    for state in states:
        # Many connections: were both on one port, the kernel would spread them over the two.
        answers = {
            httpx.get(f"{state.http_url}/where", timeout=60).json()["cluster"] for _ in range(20)
        }
        assert answers == {state.cluster_id}
    running = [one.processes() for one in pair]
    for processes in running:
        names = {process.name() for process in processes}
        assert {"raylet", "gcs_server", "haproxy"} <= names

    pair[0].signal(signal.SIGINT)
    assert pair[0].wait() == 0
    assert "LEFT 0" in pair[0].output
    assert not still_running(running[0])
    assert not pair[0].processes()
    answer = httpx.get(f"{states[1].http_url}/where", timeout=60).json()
    assert answer["cluster"] == states[1].cluster_id

    pair[1].signal(signal.SIGTERM)
    assert pair[1].wait() == 0
    assert not still_running(running[1])
    assert not pair[1].processes()
    assert list_states(tmp_path / "state") == []
    assert not any(Path(state.run_dir).exists() for state in states)


def test_a_signal_during_the_start_leaves_nothing(start):
    cluster = start()
    cluster.wait_for("starting Ray Serve")
    cluster.signal(signal.SIGTERM)
    assert cluster.wait() == 0, cluster.output
    assert "LEFT 0" in cluster.output
    assert not cluster.processes()


def test_the_remains_of_a_killed_cluster_are_ended_by_the_next(start, tmp_path):
    cluster = start()
    state = cluster.wait_for("READY")
    cluster.signal(signal.SIGKILL)
    cluster.wait()
    assert end_stale_clusters(tmp_path / "state") == 1
    assert not cluster.processes()
    assert not Path(state.run_dir).exists()
    assert list_states(tmp_path / "state") == []


def test_a_taken_port_is_named_before_anything_starts(tmp_path):
    def never(config: ClusterConfig):
        raise AssertionError("nothing may be built")

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        config = ClusterConfig(server=ServerConfig(http_port=0, grpc_port=port))
        cluster = LocalCluster(
            config, ServedApp(build=never, grpc_servicer_functions=()), state_dir=tmp_path
        )
        with (
            pytest.raises(PortInUseError, match=f"port {port} is in use.*server.grpc_port"),
            cluster,
        ):
            pass
    assert list_states(tmp_path) == []


def test_a_replica_that_cannot_start_ends_the_start_with_its_reason(tmp_path, config_file):
    command = ["-m", "tests.integration.cluster.trivial_app", str(config_file), "--broken"]
    cluster = ClusterProcess(command, tmp_path / "state")
    try:
        assert cluster.wait(300) == ClusterStartError.exit_code
        assert "the reason it broke" in cluster.output
        assert list_states(tmp_path / "state") == []
    finally:
        cluster.kill()
