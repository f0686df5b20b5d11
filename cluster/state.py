"""State files: how one command finds the cluster that another one started.

A state file holds addresses and process ids, never a secret. It lies in a folder that only its
owner can read, and is removed when the cluster stops; one whose owner has died is stale, and what
is left of its cluster is ended before the next one starts.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.errors import ClusterStartError, NoClusterError
from cluster.processes import ClusterProcesses

logger = logging.getLogger(__name__)

_END_STALE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """A running cluster, as seen from outside.

    Attributes:
        pid: of the process that owns the cluster.
        pid_started: that process's start time, seconds since the epoch; guards against reuse.
        metrics_url: Prometheus endpoint of Ray, where replicas export their metrics.
        kv_address: the hot KV tier without credentials, or None where there is none.
        ssd_roots: folders of the warm KV tier.
        started: seconds since the epoch.
    """

    cluster_id: str
    pid: int
    pid_started: float
    run_dir: str
    http_url: str
    grpc_address: str
    metrics_url: str
    model: str
    kv_address: str | None
    ssd_roots: list[str]
    started: float

    def is_alive(self) -> bool:
        """Whether the owner still runs."""
        try:
            return abs(psutil.Process(self.pid).create_time() - self.pid_started) < 1.0
        except psutil.Error:
            return False


def default_state_dir() -> Path:
    """``$PACELINE_STATE_DIR``, else ``paceline`` in the user's XDG state folder."""
    if explicit := os.environ.get("PACELINE_STATE_DIR"):
        return Path(explicit)
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "paceline"


def write_state(state_dir: Path, state: ClusterState) -> None:
    """Publish a cluster; readable by its owner only."""
    folder = state_dir / "clusters"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = folder / f".{state.cluster_id}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        json.dump(asdict(state), handle, indent=2)
    temporary.replace(folder / f"{state.cluster_id}.json")


def remove_state(state_dir: Path, cluster_id: str) -> None:
    """Withdraw a cluster; unknown ids are ignored."""
    (state_dir / "clusters" / f"{cluster_id}.json").unlink(missing_ok=True)


def list_states(state_dir: Path) -> list[ClusterState]:
    """Every published cluster, dead ones included, oldest first."""
    states = []
    for path in (state_dir / "clusters").glob("*.json"):
        try:
            states.append(ClusterState(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError) as error:
            logger.warning("unreadable state file %s: %s", path.name, error)
    return sorted(states, key=lambda state: state.started)


def find_cluster(state_dir: Path, cluster_id: str | None = None) -> ClusterState:
    """The running cluster of that id, or the newest one.

    Raises:
        NoClusterError: there is none.
    """
    alive = [state for state in list_states(state_dir) if state.is_alive()]
    if cluster_id is not None:
        alive = [state for state in alive if state.cluster_id.startswith(cluster_id)]
    if not alive:
        wanted = f"no cluster {cluster_id} is running" if cluster_id else "no cluster is running"
        raise NoClusterError(f"{wanted}; start one with: paceline serve")
    return alive[-1]


def end_stale_clusters(state_dir: Path) -> int:
    """End what is left of clusters whose owner died without a stop.

    Returns:
        The number of such clusters.
    """
    stale = [state for state in list_states(state_dir) if not state.is_alive()]
    for state in stale:
        run_dir = Path(state.run_dir)
        left = ClusterProcesses(state.cluster_id, run_dir).end(_END_STALE_TIMEOUT_S)
        if not left:
            shutil.rmtree(run_dir, ignore_errors=True)
            remove_state(state_dir, state.cluster_id)
    return len(stale)


def secret_file(state_dir: Path, name: str) -> Path:
    """A secret of this user, drawn at its first use and the same ever since.

    Raises:
        ClusterStartError: the file is there and empty.
    """
    path = state_dir / name
    state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists():
        # Linked when it is whole: another cluster may start at this moment, and the first one's
        # secret must be everybody's.
        with tempfile.NamedTemporaryFile("w", dir=state_dir, prefix=f".{name}-") as draft:
            draft.write(secrets.token_hex(32))
            draft.flush()
            with suppress(FileExistsError):
                os.link(draft.name, path)
    if not path.read_text().strip():
        raise ClusterStartError(f"{path} holds no secret; remove it, and the next start draws one")
    return path
