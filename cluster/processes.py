"""Finding and ending every process of one local cluster.

A process belongs to a cluster if its environment carries the cluster's marker, if it descends from
such a process, or if its command line names the cluster's run folder. Environment and descent
alone do not suffice: Ray's workers overwrite their environment block with a process title, and a
daemon whose parent died is no longer anybody's descendant.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

logger = logging.getLogger(__name__)

MARKER_VARIABLE = "PACELINE_CLUSTER_ID"
"""Environment variable that every process of a cluster inherits."""


class ClusterProcesses:
    """The processes of one cluster, the one that owns it excluded."""

    def __init__(self, cluster_id: str, run_dir: Path) -> None:
        """Watch a cluster.

        Args:
            cluster_id: the marker's value.
            run_dir: the cluster's own folder; its path is unique to the cluster.
        """
        self._cluster_id = cluster_id
        self._run_dir = str(run_dir)
        self._seen: set[psutil.Process] = set()

    def find(self) -> list[psutil.Process]:
        """Every living process of the cluster, now."""
        found = {process for process in psutil.process_iter() if self._is_marked(process)}
        # A psutil.Process equals another only if pid and start time agree, so a recycled pid is
        # never taken for the process that was seen before.
        self._seen = {process for process in self._seen if _is_alive(process)}
        for process in found | self._seen:
            found.update(_descendants(process))
        own_pid = os.getpid()
        found = {process for process in found | self._seen if process.pid != own_pid}
        self._seen |= found
        return [process for process in found if _is_alive(process)]

    def remember(self) -> None:
        """Take note of who runs now, so that they are found even once orphaned and renamed."""
        self.find()

    def end(self, timeout_s: float) -> int:
        """End every process: politely, and after half of the time by force.

        Args:
            timeout_s: seconds, at most.

        Returns:
            How many were left at the end of the time.
        """
        deadline = time.monotonic() + timeout_s
        polite_until = time.monotonic() + timeout_s / 2
        signalled: set[psutil.Process] = set()
        # New children can appear between two looks (a supervisor restarts what was ended), hence
        # a loop instead of one sweep.
        while remaining := self.find():
            now = time.monotonic()
            if now >= deadline:
                break
            if now < polite_until:
                _signal(set(remaining) - signalled, force=False)
                signalled.update(remaining)
            else:
                _signal(remaining, force=True)
            psutil.wait_procs(remaining, timeout=0.25)
        left = self.find()
        for process in left:
            logger.error("process %d of cluster %s did not end", process.pid, self._cluster_id)
        return len(left)

    def _is_marked(self, process: psutil.Process) -> bool:
        try:
            if process.environ().get(MARKER_VARIABLE) == self._cluster_id:
                return True
            return any(self._run_dir in argument for argument in process.cmdline())
        except (psutil.Error, OSError):
            return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _signal(processes: Iterable[psutil.Process], *, force: bool) -> None:
    for process in processes:
        try:
            process.kill() if force else process.terminate()
        except psutil.Error:
            continue
