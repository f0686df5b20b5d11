"""How many of the draft tokens at hand a step verifies, and what may be spent on finding that out.

The choice is ``budget.choose``'s, by what steps took so far. What is not known of late has to be
tried, though it may not pay: wide steps, and drafts of sequences that were left out for long. All
such trials together may take a hundredth of the time: where speculation is slower than plain
decoding, finding that out costs no more.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.speculation.budget import Choice, choose
from deployments.engine.speculation.step_times import StepTimes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TRIAL_SHARE = 0.01
_MOST_TRIAL_STEPS = 8
"""Plain steps' worth of trials that may be saved up, and that the first ones have at once."""


class AtHand(NamedTuple):
    """A sequence's draft.

    Attributes:
        chances: of each of its tokens, that it and all before it are accepted.
        is_due: whether it was left out for so long that a token of it is worth a trial.
    """

    chances: Sequence[float]
    is_due: bool = False


class StepPlanner:
    """Learns from the steps of one engine; not thread-safe.

    Attributes:
        times: what steps take by their rows.
    """

    def __init__(self) -> None:
        self.times = StepTimes()
        self._allowance_s = 0.0
        self._num_rows_untried: int | None = None

    def is_plain_tried(self, num_rows: int) -> bool:
        """Whether the next step is plain, to learn what drafts must beat."""
        return self.times.is_known and not self.times.is_fresh(num_rows)

    def plan(
        self,
        drafts: Sequence[AtHand],
        num_rows: int,
        num_tokens: int,
        targets_s: Mapping[int, float],
    ) -> Choice:
        """What to verify.

        Args:
            drafts: of the sequences that can have some.
            num_rows: of the step without drafts.
            num_tokens: what the step gives without drafts.
            targets_s: as in ``budget.choose``.
        """
        at_hand = [len(draft.chances) for draft in drafts]
        self._num_rows_untried = None
        if not self.times.is_known:
            return Choice(at_hand)
        if self.is_plain_tried(num_rows):
            return Choice([0] * len(drafts))
        plain_s, widest = self.times.seconds(num_rows), num_rows + sum(at_hand)
        # Nobody misses a target because of a trial.
        limit_s = min((s for s in targets_s.values() if s >= plain_s), default=math.inf)
        if not self.times.is_fresh(widest) and self._affords(num_rows, widest, limit_s):
            return Choice(at_hand)
        tried: set[int] = set()
        for index, draft in enumerate(drafts):
            if (
                draft.is_due
                and draft.chances
                and self._affords(num_rows, num_rows + len(tried) + 1, limit_s)
            ):
                tried.add(index)
        chances = [() if index in tried else draft.chances for index, draft in enumerate(drafts)]
        choice = choose(chances, num_rows + len(tried), num_tokens, self.times.seconds, targets_s)
        if tried:  # what pays for itself is no trial's cost
            self._num_rows_untried = num_rows + sum(choice.lengths)
        for index in tried:
            choice.lengths[index] = 1
        return choice

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learn from a step."""
        is_first = not self.times.is_known
        if self._num_rows_untried is not None:
            self._allowance_s -= max(0.0, seconds - self.times.seconds(self._num_rows_untried))
        self.times.observe(num_rows, seconds)
        most_s = _MOST_TRIAL_STEPS * seconds
        self._allowance_s = min(most_s, self._allowance_s + _TRIAL_SHARE * seconds)
        if is_first:
            self._allowance_s = most_s

    def _affords(self, num_plain_rows: int, num_rows: int, limit_s: float) -> bool:
        """Whether a trial of so many rows may be paid for; what it took is paid, then."""
        expected_s = self.times.seconds(num_rows)
        cost_s = expected_s - self.times.seconds(num_plain_rows)
        is_affordable = cost_s <= self._allowance_s and expected_s <= limit_s
        if is_affordable:
            self._num_rows_untried = num_plain_rows
        return is_affordable
