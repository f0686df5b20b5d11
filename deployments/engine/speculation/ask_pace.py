"""How large a table one draft replica is asked for: as large as mostly still comes in time.

A table is worth its rows only if it is there when the round ends that it was asked for. A drafter
is told when that will be, and one that heeds it cuts its drafts itself. Where too many are late
nevertheless, less is asked: guesses of the bonus token are left out first (F), then the drafts get
shorter (k), as in the drafter's own shedding; while hardly any is late it grows again, more and
more carefully where growing failed. If even the smallest mostly comes late, nothing is asked for a
while: a drafter that cannot keep up only takes processors and network from those that can.
"""

from __future__ import annotations

from deployments.engine.speculation.types import NO_ASK, Ask

_TOO_MANY_LATE, _FEW_LATE, _MOSTLY_LATE = 0.4, 0.15, 0.6
_BETWEEN = 0.25
"""What the share of late tables is taken for when their size has changed."""
_WEIGHT = 1 / 16
_PATIENCE = 8
_MAX_PATIENCE = 64
_PAUSE, _MAX_PAUSE = 8, 32
"""Asks: a drafter that is well again is noticed within so many rounds of a session."""


class AskPace:
    """Not thread-safe; belongs to one link."""

    def __init__(self) -> None:
        self._num_shed = 0
        self._most_shed = 0
        self._late_share = _BETWEEN
        self._num_tables = 0
        self._patience = _PATIENCE
        self._pause = _PAUSE
        self._num_to_pass = 0

    def limit(self, ask: Ask) -> Ask:
        """What to ask instead, possibly nothing."""
        if not ask.fanout:
            return ask
        if self._num_to_pass:
            self._num_to_pass -= 1
            return NO_ASK
        num_draft_tokens, fanout, _ = ask
        self._most_shed = fanout - 1 + max(0, num_draft_tokens - 1)
        num_shed = min(self._num_shed, self._most_shed)
        shed_fanout = min(num_shed, fanout - 1)
        return ask._replace(
            num_draft_tokens=num_draft_tokens - (num_shed - shed_fanout),
            fanout=fanout - shed_fanout,
        )

    def on_table(self, *, is_late: bool) -> None:
        """Learn from a table's arrival."""
        self._num_tables += 1
        self._late_share += _WEIGHT * (is_late - self._late_share)
        if not is_late:
            self._pause = _PAUSE
            if (
                self._num_shed
                and self._late_share < _FEW_LATE
                and self._num_tables >= self._patience
            ):
                self._resize(-1)
        elif self._num_shed < self._most_shed:
            if self._late_share > _TOO_MANY_LATE:
                # It came soon after growing, or never stopped.
                is_soon = self._num_tables < self._patience
                self._patience = min(2 * self._patience, _MAX_PATIENCE) if is_soon else _PATIENCE
                self._resize(1)
        elif self._late_share > _MOSTLY_LATE:
            self._num_to_pass = self._pause
            self._pause = min(2 * self._pause, _MAX_PAUSE)

    def _resize(self, num_shed: int) -> None:
        self._num_shed += num_shed
        self._num_tables = 0
        self._late_share = _BETWEEN
