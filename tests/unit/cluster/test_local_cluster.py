"""The order in which a cluster goes down, with a plain process in Ray's place."""

import os
import secrets
import signal
import stat
import subprocess
import sys

import pytest

from cluster import local_cluster, preparation
from cluster.cli import main
from cluster.config import ClusterConfig, ServerConfig
from cluster.errors import ClusterStartError
from cluster.local_cluster import LocalCluster
from cluster.processes import ClusterProcesses
from cluster.ray_environment import SERVE_FLAGS
from cluster.serve_app import ServedApp
from cluster.signals import StopRequestedError, stop_on_signals
from cluster.state import list_states, secret_file

APP = ServedApp(build=lambda config: pytest.fail("built"), grpc_servicer_functions=())


@pytest.fixture(autouse=True)
def _serve_flags(monkeypatch):
    # Another test of this process may have imported Ray Serve, which then must be under these.
    for name, value in SERVE_FLAGS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def broken_ray(monkeypatch):
    """Ray leaves a process behind and does not start; gives the processes left so."""
    left: list[subprocess.Popen] = []

    def start_ray(*_: object) -> None:
        left.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))
        raise RuntimeError("Ray is broken")

    monkeypatch.setattr(LocalCluster, "_start_ray", start_ray)
    yield left
    for process in left:
        process.kill()
        process.communicate()


@pytest.fixture
def cluster(tmp_path):
    """Makes a cluster that calls ``action`` at the moment it ends its processes."""

    def make(action) -> LocalCluster:
        def on_progress(message: str) -> None:
            if message == "ending what is left":
                action()

        config = ClusterConfig(kv=None, server=ServerConfig(http_port=0, grpc_port=0))
        return LocalCluster(config, APP, state_dir=tmp_path, on_progress=on_progress)

    return make


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_during_a_failing_start_leaves_nothing(
    cluster, broken_ray, tmp_path, signum
):
    repeats = []
    failing = cluster(lambda: signal.raise_signal(signum))
    with (
        stop_on_signals(lambda: repeats.append(signum)),
        pytest.raises(ClusterStartError, match="Ray is broken"),
        failing,
    ):
        pass
    assert repeats == [signum]
    assert failing.num_processes_left == 0
    assert broken_ray[0].poll() is not None
    assert list_states(tmp_path) == []


def test_a_cluster_can_be_found_until_its_processes_have_ended(cluster, broken_ray, tmp_path):
    found = []
    failing = cluster(lambda: found.extend(list_states(tmp_path)))
    with pytest.raises(ClusterStartError), failing:
        pass
    assert [state.pid for state in found] == [os.getpid()]
    assert list_states(tmp_path) == []


def test_processes_that_do_not_end_stay_announced(cluster, broken_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(ClusterProcesses, "end", lambda self, timeout_s: 2)
    failing = cluster(lambda: None)
    with pytest.raises(ClusterStartError), failing:
        pass
    assert failing.num_processes_left == 2
    assert len(list_states(tmp_path)) == 1


def test_a_signal_before_anything_started_leaves_no_process(cluster, monkeypatch):
    stopped = cluster(lambda: None)
    monkeypatch.setattr(
        local_cluster, "end_stale_clusters", lambda _: signal.raise_signal(signal.SIGINT)
    )
    with stop_on_signals(lambda: None), pytest.raises(StopRequestedError), stopped:
        pass
    assert stopped.num_processes_left == 0


def test_serve_tells_of_a_stop_during_a_failing_start_in_plain_words(
    broken_ray, tmp_path, monkeypatch, capsys
):
    end = ClusterProcesses.end

    def interrupted_end(self: ClusterProcesses, timeout_s: float) -> int:
        signal.raise_signal(signal.SIGINT)
        return end(self, timeout_s)

    config = tmp_path / "c.yaml"
    config.write_text("server: {http_port: 0, grpc_port: 0}\nkv: null\n")
    monkeypatch.setenv("PACELINE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(preparation, "check_prepared", lambda config: None)
    monkeypatch.setattr(ClusterProcesses, "end", interrupted_end)
    monkeypatch.setattr(sys, "argv", ["paceline", "serve", "--config", str(config)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == ClusterStartError.exit_code
    assert "Ray is broken" in said
    assert "stopping; this takes up to" in said
    assert broken_ray[0].poll() is not None


def test_a_secret_is_drawn_once_and_only_its_owner_can_read_it(tmp_path):
    path = secret_file(tmp_path, "token")
    drawn = path.read_text()
    assert len(drawn) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret_file(tmp_path, "token").read_text() == drawn
    assert list(tmp_path.iterdir()) == [path]


def test_two_first_starts_at_once_share_one_whole_secret(tmp_path, monkeypatch):
    token_hex = secrets.token_hex
    seen_by_the_other = []

    def another_start_comes_first(num_bytes: int) -> str:
        monkeypatch.setattr(secrets, "token_hex", token_hex)
        seen_by_the_other.append(secret_file(tmp_path, "token").read_text())
        return token_hex(num_bytes)

    monkeypatch.setattr(secrets, "token_hex", another_start_comes_first)
    seen = secret_file(tmp_path, "token").read_text()
    assert seen_by_the_other == [seen]
    assert len(seen) == 64


def test_an_empty_secret_is_refused(tmp_path):
    (tmp_path / "token").touch()
    with pytest.raises(ClusterStartError, match="token holds no secret; remove it"):
        secret_file(tmp_path, "token")
