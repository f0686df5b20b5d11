"""Whether a process grows: its resident memory over time, and a line through it."""

from __future__ import annotations

from typing import NamedTuple


class Sample(NamedTuple):
    """One look at the process."""

    at_s: float
    resident_mb: float
    num_tokens: int


def slope_mb_per_min(samples: list[Sample]) -> float:
    """The least-squares line through the second half of the samples."""
    half = samples[len(samples) // 2 :]
    mean_x = sum(sample.at_s for sample in half) / len(half)
    mean_y = sum(sample.resident_mb for sample in half) / len(half)
    spread = sum((sample.at_s - mean_x) ** 2 for sample in half)
    if not spread:
        return 0.0
    common = sum((s.at_s - mean_x) * (s.resident_mb - mean_y) for s in half)
    return 60.0 * common / spread


def growth_mb(samples: list[Sample]) -> float:
    """How much higher the last quarter's peak is than the one of the quarter before."""
    quarter = max(1, len(samples) // 4)
    before, last = samples[-2 * quarter : -quarter] or samples, samples[-quarter:]
    return max(s.resident_mb for s in last) - max(s.resident_mb for s in before)


def tokens_per_s(samples: list[Sample], quarter: int) -> float:
    """Output of one quarter, counted from 0."""
    size = len(samples) // 4
    part = samples[quarter * size : (quarter + 1) * size + 1]
    if len(part) < 2:
        return 0.0
    return (part[-1].num_tokens - part[0].num_tokens) / (part[-1].at_s - part[0].at_s)
