"""Timing contestants side by side: all run in every round, in any order; median rounds count."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one contestant, round by round.

    Attributes:
        wall_s_per_gb: wall clock.
        cpu_s_per_gb: of this process, all threads.
    """

    wall_s_per_gb: tuple[float, ...]
    cpu_s_per_gb: tuple[float, ...]

    @property
    def gb_per_s(self) -> float:
        """Of the median round."""
        return 1 / median(self.wall_s_per_gb)

    @property
    def median_cpu_s_per_gb(self) -> float:
        """Of the median round."""
        return median(self.cpu_s_per_gb)

    def speed_of(self, other: Speed) -> float:
        """How many times as fast as another: the median of the rounds' ratios.

        A machine that others share changes its speed within seconds, and both alike.
        """
        return _median_ratio(other.wall_s_per_gb, self.wall_s_per_gb)

    def cpu_of(self, other: Speed) -> float:
        """As ``speed_of``, of the processor time it takes."""
        return _median_ratio(self.cpu_s_per_gb, other.cpu_s_per_gb)


def race(
    contestants: Mapping[str, Callable[[], int]], *, num_rounds: int = 9, round_s: float = 0.1
) -> dict[str, Speed]:
    """Run all, ``num_rounds`` times after one to warm up, each time in another order.

    Args:
        contestants: each moves some bytes and returns how many.
        num_rounds: how often each is timed.
        round_s: a contestant goes on for so long, for a moment's luck tells nothing.
    """
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    order = random.Random(0)  # noqa: S311 - no secret
    for number in range(num_rounds + 1):
        for name in order.sample(list(contestants), len(contestants)):
            run = contestants[name]
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            num_bytes = run()
            while time.perf_counter() - wall_start < round_s:
                num_bytes += run()
            if number:
                cpu[name].append((time.process_time() - cpu_start) / num_bytes * 1e9)
                wall[name].append((time.perf_counter() - wall_start) / num_bytes * 1e9)
    return {name: Speed(tuple(wall[name]), tuple(cpu[name])) for name in contestants}


def _median_ratio(above: tuple[float, ...], below: tuple[float, ...]) -> float:
    return median(a / b for a, b in zip(above, below, strict=True))
