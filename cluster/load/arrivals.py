"""When requests arrive: a rate over time, and gaps of a chosen regularity."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_GRID_S = 0.01


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of time with one law of its rate.

    Attributes:
        begin: requests per second at its start.
        end: and at its end; the rate is a line between the two.
        seconds: its length.
        is_wave: the rate swings from ``begin`` to ``end`` and back, as over a day.
    """

    begin: float
    end: float
    seconds: float
    is_wave: bool = False

    def rate(self, at_s: float) -> float:
        """Requests per second, ``at_s`` seconds into the segment."""
        share = at_s / self.seconds
        if self.is_wave:
            share = (1 - math.cos(2 * math.pi * share)) / 2
        return self.begin + (self.end - self.begin) * share


def parse_profile(text: str) -> tuple[Segment, ...]:
    """Segments of a profile such as ``2:60,2-16:30,16:180``.

    ``RATE:SECONDS`` holds a rate, ``FROM-TO:SECONDS`` is a ramp and ``LOW~HIGH:SECONDS`` a wave.

    Raises:
        ConfigError: a part has another form, a negative rate or no length.
    """
    return tuple(_segment(part.strip()) for part in text.split(","))


def _segment(part: str) -> Segment:
    rates, _, seconds = part.partition(":")
    sign = next((sign for sign in "-~" if sign in rates), None)
    begin, end = rates.split(sign, 1) if sign else (rates, rates)
    try:
        segment = Segment(float(begin), float(end), float(seconds), is_wave=sign == "~")
    except ValueError:
        raise ConfigError(
            (f"--rate: {part!r} is none of RATE:SECONDS, FROM-TO:SECONDS and LOW~HIGH:SECONDS",)
        ) from None
    numbers = (segment.begin, segment.end, segment.seconds)
    if not all(map(math.isfinite, numbers)) or min(numbers) < 0 or segment.seconds == 0:
        raise ConfigError((f"--rate: {part!r} needs rates of at least 0 and a length over 0",))
    return segment


def arrival_times(segments: Sequence[Segment], *, burstiness: float, seed: int) -> Iterator[float]:
    """Arrivals of a profile, in seconds from its start.

    Gaps are drawn in units of expected arrivals and then stretched by the rate, so that one law
    serves every profile.

    Args:
        segments: one after another.
        burstiness: variance of a gap over its squared mean; 1 is a Poisson process, more comes in
            bursts, 0 is a metronome.
        seed: the same one gives the same arrivals.
    """
    draw = random.Random(seed)  # noqa: S311 - a schedule, no secret
    rates = [
        segment.rate((step + 0.5) * _GRID_S)
        for segment in segments
        for step in range(round(segment.seconds / _GRID_S))
    ]
    expected = list(accumulate(rate * _GRID_S for rate in rates))
    passed = 0.0
    while True:
        passed += draw.gammavariate(1 / burstiness, burstiness) if burstiness else 1.0
        step = bisect_left(expected, passed)
        if step == len(expected):
            return
        behind = (expected[step] - passed) / (rates[step] * _GRID_S)
        yield (step + 1 - behind) * _GRID_S
