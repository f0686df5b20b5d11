"""Timing contestants side by side: all run in every round, the least disturbed one counts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class Speed:
    """Of the best round of each kind.

    Attributes:
        gb_per_s: wall clock.
        cpu_s_per_gb: of this process, all threads.
    """

    gb_per_s: float
    cpu_s_per_gb: float


def race(contestants: Mapping[str, Callable[[], int]], *, num_rounds: int = 5) -> dict[str, Speed]:
    """Run all in turn, ``num_rounds`` times after one to warm up.

    Args:
        contestants: each moves some bytes and returns how many.
        num_rounds: how often each is timed.
    """
    wall = dict.fromkeys(contestants, float("inf"))
    cpu = dict.fromkeys(contestants, float("inf"))
    for number in range(num_rounds + 1):
        for name, run in contestants.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            gigabytes = run() / 1e9
            cpu_s = (time.process_time() - cpu_start) / gigabytes
            wall_s = (time.perf_counter() - wall_start) / gigabytes
            if number:
                cpu[name] = min(cpu[name], cpu_s)
                wall[name] = min(wall[name], wall_s)
    return {name: Speed(1 / wall[name], cpu[name]) for name in contestants}
