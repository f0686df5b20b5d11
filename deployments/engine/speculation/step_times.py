"""What a step of the target takes by the number of its rows, learned from the steps that ran."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

_EXACT_ROWS = 16
_STEPS_PER_OCTAVE = 4
_WEIGHT = 0.1
_DRIFT_WEIGHT = 0.05
_FRESH_STEPS = 512
_FRESH_SAMPLES = 2
_LEAST_SHARE = 0.25
"""Of the narrowest step that was measured; no step is expected to take less."""
_MOST_SURPRISING = 2.0
"""A step that took more times as long as expected, or less, teaches no more than this factor."""


@dataclass(slots=True)
class _Width:
    """What is known of one width.

    Attributes:
        num_rows: of the steps that it stands for, on average.
        num_samples: since it was last seen again after long.
        seen_at: number of the step.
    """

    num_rows: float
    seconds: float
    num_samples: int
    seen_at: int


class StepTimes:
    """A rising curve through what was measured; not thread-safe.

    It is straight between two measured widths, and goes on as steeply beyond the outer ones.
    A width that was never tried looks cheap at first, so it is tried. What one width learns moves
    the others a little too, because a machine gets faster or slower for all of them at once.
    """

    def __init__(self) -> None:
        self._widths: dict[int, _Width] = {}
        self._num_steps = 0
        self._curve: list[tuple[float, float]] = []

    @property
    def is_known(self) -> bool:
        """Whether any step was seen."""
        return bool(self._widths)

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learn from a step; one without rows or time teaches nothing."""
        if num_rows <= 0 or seconds <= 0:
            return
        self._num_steps += 1
        new = _Width(num_rows, seconds, 0, self._num_steps)
        known = self._widths.setdefault(_width(num_rows), new)
        if self._num_steps - known.seen_at >= _FRESH_STEPS:
            known.num_samples = 0
        ratio = seconds / known.seconds
        if known.num_samples >= _FRESH_SAMPLES:
            ratio = min(_MOST_SURPRISING, max(1 / _MOST_SURPRISING, ratio))
            drift = ratio**_DRIFT_WEIGHT
            for other in self._widths.values():
                if other is not known:
                    other.seconds *= drift
        weight = max(_WEIGHT, 1 / (known.num_samples + 1))
        known.seconds *= ratio**weight
        known.num_rows += weight * (num_rows - known.num_rows)
        known.num_samples += 1
        known.seen_at = self._num_steps
        self._curve = _rising(sorted((one.num_rows, one.seconds) for one in self._widths.values()))

    def is_fresh(self, num_rows: int) -> bool:
        """Whether steps of so many rows were seen lately."""
        known = self._widths.get(_width(num_rows))
        if known is None or known.num_samples < _FRESH_SAMPLES:
            return False
        return self._num_steps - known.seen_at < _FRESH_STEPS

    def seconds(self, num_rows: int) -> float:
        """What a step of so many rows is expected to take.

        Raises:
            LookupError: no step was seen.
        """
        curve = self._curve
        if not curve:
            raise LookupError("no step was seen")
        at = bisect_left(curve, float(num_rows), key=lambda point: point[0])
        if at < len(curve) and curve[at][0] == num_rows:
            return curve[at][1]
        if len(curve) == 1:
            return curve[0][1]
        at = min(max(at, 1), len(curve) - 1)
        (left, low), (right, high) = curve[at - 1], curve[at]
        seconds = low + (high - low) * (num_rows - left) / (right - left)
        return max(seconds, _LEAST_SHARE * low)


def _width(num_rows: int) -> int:
    """The measured width that stands for so many rows."""
    if num_rows <= _EXACT_ROWS:
        return num_rows
    return round(2 ** (round(math.log2(num_rows) * _STEPS_PER_OCTAVE) / _STEPS_PER_OCTAVE))


def _rising(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The nearest curve that never falls: neighbours that fall are averaged."""
    blocks: list[tuple[float, list[float]]] = []
    for width, seconds in points:
        blocks.append((seconds, [width]))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (high, left), (low, right) = blocks[-2:]
            total = high * len(left) + low * len(right)
            blocks[-2:] = [(total / (len(left) + len(right)), left + right)]
    return [(width, seconds) for seconds, widths in blocks for width in widths]
