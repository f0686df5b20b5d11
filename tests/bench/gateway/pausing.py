"""Gives the machine to one cluster at a time: the others' processes are stopped meanwhile.

An idle cluster is not quiet. Ray's and Serve's control loops take a tenth of a core or two each,
of which a machine in service has those of one cluster.
"""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Sequence

_SETTLES_S = 2.0
"""Timers that ran out meanwhile all fire when a cluster goes on."""


class Turns:
    """Used as a context; at its end everybody goes on.

    Args:
        pids: of the clusters' first processes.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._roots = {pid: psutil.Process(pid) for pid in pids}
        self._stopped: set[int] = set()

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._stopped):
            self._send(pid, signal.SIGCONT)

    def give(self, pid: int | None) -> None:
        """To one cluster; with None all are stopped."""
        for other in self._roots.keys() - self._stopped - {pid}:
            self._send(other, signal.SIGSTOP)
            self._stopped.add(other)
        if pid in self._stopped:
            self._send(pid, signal.SIGCONT)
            self._stopped.remove(pid)
            time.sleep(_SETTLES_S)

    def _send(self, pid: int, number: signal.Signals) -> None:
        root = self._roots[pid]
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
