"""How large a table one draft replica is asked for: as large as still comes in time.

A table is worth its rows only if it is there when the round ends that it was asked for. So late
ones shrink what is asked, guesses of the bonus token first (F), then the length of the drafts (k),
as the drafter's own shedding does; tables in time let it grow again, more and more carefully where
growing failed. If even the smallest comes late, nothing is asked for a while: a drafter that cannot
keep up only takes processors and network from those that can.
"""

from __future__ import annotations

from deployments.engine.speculation.types import NO_ASK, Ask

_PATIENCE = 8
_MAX_PATIENCE = 64
_MAX_PAUSE = 32
"""Asks: a drafter that is well again is noticed within so many rounds of a session."""


class AskPace:
    """Not thread-safe; belongs to one link."""

    def __init__(self) -> None:
        self._num_shed = 0
        self._most_shed = 0
        self._num_in_time = 0
        self._patience = _PATIENCE
        self._pause = _PATIENCE
        self._num_to_pass = 0

    def limit(self, ask: Ask) -> Ask:
        """What to ask instead, possibly nothing."""
        if not ask.fanout:
            return ask
        if self._num_to_pass:
            self._num_to_pass -= 1
            return NO_ASK
        num_draft_tokens, fanout = ask
        self._most_shed = fanout - 1 + max(0, num_draft_tokens - 1)
        num_shed = min(self._num_shed, self._most_shed)
        shed_fanout = min(num_shed, fanout - 1)
        return Ask(num_draft_tokens - (num_shed - shed_fanout), fanout - shed_fanout)

    def on_table(self, *, is_late: bool) -> None:
        """Learn from a table's arrival."""
        if is_late:
            self._on_late()
            return
        self._pause = _PATIENCE
        self._num_in_time += 1
        if self._num_in_time >= self._patience and self._num_shed:
            self._num_in_time = 0
            self._num_shed -= 1

    def _on_late(self) -> None:
        if self._num_in_time < self._patience:
            # It came soon after growing, or never stopped.
            self._patience = min(2 * self._patience, _MAX_PATIENCE)
        else:
            self._patience = _PATIENCE
        self._num_in_time = 0
        if self._num_shed < self._most_shed:
            self._num_shed += 1
        else:
            self._num_to_pass = self._pause
            self._pause = min(2 * self._pause, _MAX_PAUSE)
