"""Timing contestants side by side: all run in every round, in turn, and the median round counts."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class Speed:
    """Of the median round of each kind.

    Attributes:
        gb_per_s: wall clock.
        cpu_s_per_gb: of this process, all threads.
    """

    gb_per_s: float
    cpu_s_per_gb: float


def race(
    contestants: Mapping[str, Callable[[], int]], *, num_rounds: int = 9, round_s: float = 0.1
) -> dict[str, Speed]:
    """Run all in turn, ``num_rounds`` times after one to warm up.

    Args:
        contestants: each moves some bytes and returns how many.
        num_rounds: how often each is timed.
        round_s: a contestant goes on for so long, for a moment's luck tells nothing.
    """
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(num_rounds + 1):
        for name, run in contestants.items():
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            num_bytes = run()
            while time.perf_counter() - wall_start < round_s:
                num_bytes += run()
            if number:
                cpu[name].append((time.process_time() - cpu_start) / num_bytes * 1e9)
                wall[name].append((time.perf_counter() - wall_start) / num_bytes * 1e9)
    return {name: Speed(1 / median(wall[name]), median(cpu[name])) for name in contestants}
