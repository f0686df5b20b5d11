"""State files."""

import os
import stat
import time
from dataclasses import replace

import psutil
import pytest

from cluster.errors import NoClusterError
from cluster.state import (
    ClusterState,
    end_stale_clusters,
    find_cluster,
    list_states,
    remove_state,
    write_state,
)


@pytest.fixture
def state(tmp_path) -> ClusterState:
    return ClusterState(
        cluster_id="abcd1234",
        pid=os.getpid(),
        pid_started=psutil.Process().create_time(),
        run_dir=str(tmp_path / "run"),
        http_url="http://127.0.0.1:1",
        grpc_address="127.0.0.1:2",
        metrics_url="http://127.0.0.1:3/metrics",
        model="m",
        kv_address=None,
        ssd_roots=[],
        started=time.time(),
    )


def test_a_cluster_is_found_by_id_and_as_the_newest(tmp_path, state):
    newer = replace(state, cluster_id="ef567890", started=state.started + 1)
    write_state(tmp_path, newer)
    write_state(tmp_path, state)
    assert find_cluster(tmp_path) == newer
    assert find_cluster(tmp_path, "abcd") == state
    with pytest.raises(NoClusterError, match="no cluster zzz is running"):
        find_cluster(tmp_path, "zzz")


def test_only_the_owner_can_read_a_state_file(tmp_path, state):
    write_state(tmp_path, state)
    [path] = (tmp_path / "clusters").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_removed_cluster_is_gone(tmp_path, state):
    write_state(tmp_path, state)
    remove_state(tmp_path, state.cluster_id)
    remove_state(tmp_path, state.cluster_id)
    with pytest.raises(NoClusterError, match="paceline serve"):
        find_cluster(tmp_path)


def test_a_recycled_pid_is_not_taken_for_the_owner(tmp_path, state):
    write_state(tmp_path, replace(state, pid_started=state.pid_started - 1000))
    with pytest.raises(NoClusterError):
        find_cluster(tmp_path)


def test_the_remains_of_a_dead_owner_are_cleared_and_the_living_left_alone(tmp_path, state):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    write_state(tmp_path, replace(state, pid_started=1.0))
    write_state(tmp_path, replace(state, cluster_id="alive", run_dir=str(tmp_path / "other")))
    assert end_stale_clusters(tmp_path) == 1
    assert [found.cluster_id for found in list_states(tmp_path)] == ["alive"]
    assert not run_dir.exists()


def test_a_damaged_state_file_is_passed_over(tmp_path, state):
    write_state(tmp_path, state)
    (tmp_path / "clusters" / "bad.json").write_text("{")
    assert list_states(tmp_path) == [state]
