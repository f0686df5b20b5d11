"""Logs of clusters that failed to start; everything else of a run folder goes with its cluster."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_NUM_KEPT = 5


def keep_logs(run_dir: Path, state_dir: Path, cluster_id: str) -> Path | None:
    """Copy a cluster's logs to the state folder, where the last few are kept.

    Returns:
        Where they are, or None if there are none yet.
    """
    sessions = sorted((run_dir / "ray").glob("session_[0-9]*/logs"))
    if not sessions:
        return None
    kept = state_dir / "logs" / cluster_id
    shutil.copytree(sessions[-1], kept, ignore_dangling_symlinks=True, dirs_exist_ok=True)
    folders = sorted(kept.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in folders[_NUM_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return kept
