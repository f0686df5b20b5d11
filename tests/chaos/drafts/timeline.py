"""What a time line says: rates, the dip, and when it was over."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.chaos.drafts.load import Sample

WINDOW_S = 1.0
ENOUGH = 0.5
"""Of the tokens that tables gave before: then they are back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Samples around a fault.

    Attributes:
        begun_at: when the fault began; what is before it is as it should be.
        back_at: when the drafter was back.
    """

    samples: Sequence[Sample]
    begun_at: float
    back_at: float

    def token_rate(self, start: float, end: float) -> float:
        """Tokens per second between two moments."""
        first, last = self._between(start, end)
        return (last.num_tokens - first.num_tokens) / max(1e-9, last.at - first.at)

    def table_rate(self, start: float, end: float) -> float:
        """Tokens per second from tables."""
        first, last = self._between(start, end)
        return (last.num_table_tokens - first.num_table_tokens) / max(1e-9, last.at - first.at)

    @property
    def first_at(self) -> float:
        """When the time line begins."""
        return self.samples[0].at

    @property
    def first_table_token_s(self) -> float | None:
        """From the drafter's return to the first token from a table; None if there was none."""
        known = self._at(self.back_at).num_table_tokens
        for sample in self.samples:
            if sample.at > self.back_at and sample.num_table_tokens > known:
                return sample.at - self.back_at
        return None

    @property
    def recovery_s(self) -> float | None:
        """From the drafter's return until tables give about as much as before; None if never.

        That is the end of the first ``WINDOW_S`` in which they gave ``ENOUGH`` of it.
        """
        least = ENOUGH * self.table_rate(self.first_at, self.begun_at)
        end = self.samples[-1].at - WINDOW_S
        for sample in self.samples:
            if not self.back_at <= sample.at <= end:
                continue
            if self.table_rate(sample.at, sample.at + WINDOW_S) >= max(least, 1e-9):
                return sample.at + WINDOW_S - self.back_at
        return None

    def _between(self, start: float, end: float) -> tuple[Sample, Sample]:
        return self._at(start), self._at(end)

    def _at(self, at: float) -> Sample:
        """The first sample from then on."""
        place = bisect_left(self.samples, at, key=lambda sample: sample.at)
        return self.samples[min(place, len(self.samples) - 1)]
