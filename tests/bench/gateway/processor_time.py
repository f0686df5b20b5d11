"""Processor time of a cluster, by what its processes are for."""

from __future__ import annotations

from collections import Counter

import psutil

_ROLES = {
    "gateway.bare": "engine",
    "ingress": "ingress",
    "target": "target",
    "haproxy": "HAProxy",
    "ProxyActor": "proxy",
}


class ProcessorTime:
    """Of a process with all below it; without ``pid`` of this one alone.

    Args:
        pid: of the first one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._root = psutil.Process(pid)
        self._is_ours = pid is None

    def read(self) -> Counter[str]:
        """Seconds since each one's start, by role."""
        spent: Counter[str] = Counter()
        below = [] if self._is_ours else self._root.children(recursive=True)
        for process in (self._root, *below):
            try:
                times, command = process.cpu_times(), " ".join(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            role = "caller" if self._is_ours else _role(command)
            spent[role] += times.user + times.system
        return spent


def _role(command: str) -> str:
    """What a process is for; Ray names those of replicas after them."""
    first, _, rest = command.partition(" ")
    is_served = first.startswith("ray::") or "haproxy" in first or "gateway.bare" in rest
    found = (role for part, role in _ROLES.items() if is_served and part in command)
    return next(found, "Ray")
