"""What drafts cost the scheduler's loop, step by step."""

from __future__ import annotations

from statistics import median

_NUM_KEPT = 1024


class StepStalls:
    """The last steps' times outside forward and choice of tokens. One thread adds, any may read."""

    def __init__(self) -> None:
        self._seconds = [0.0] * _NUM_KEPT
        self._num_steps = 0

    def add(self, seconds: float) -> None:
        """Count a step."""
        self._seconds[self._num_steps % _NUM_KEPT] = seconds
        self._num_steps += 1

    @property
    def p50_s(self) -> float:
        """The median; 0 before the first step."""
        known = self._seconds[: self._num_steps]
        return median(known) if known else 0.0
