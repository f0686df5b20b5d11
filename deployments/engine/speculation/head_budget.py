"""Whether a step asks the head, and for how many tokens: its time is the step's own.

The head's tokens compete with what is at hand already, before anybody knows what they are: their
chances are those that its tokens had of late. Where head and another drafter both have something to
say, the better of the two counts, as if they said the same.
"""

from __future__ import annotations

from functools import partial
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.speculation.budget import goodput
from deployments.engine.speculation.step_times import StepTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PROBE_INTERVAL_STEPS = 64
"""A head that does not pay is asked for one token of one sequence this often."""


class HeadAsk(NamedTuple):
    """What to ask the head.

    Attributes:
        indices: of the sequences.
        num_passes: tokens for each of them, one pass each; 0 for none.
        is_probe: to learn whether it pays by now.
    """

    indices: list[int]
    num_passes: int
    is_probe: bool = False


class HeadBudget:
    """Learns what a pass of the head takes, by the number of its sequences; not thread-safe."""

    def __init__(self) -> None:
        self._times = StepTimes()
        self._num_steps_without = 0

    def observe(self, ask: HeadAsk, seconds: float) -> None:
        """Learn from a call."""
        self._times.observe(len(ask.indices), seconds / ask.num_passes)

    def plan(
        self,
        own: Sequence[Sequence[float]],
        its: Sequence[Sequence[float]],
        num_rows: int,
        num_tokens: int,
        seconds_of: Callable[[int], float] | None,
    ) -> HeadAsk:
        """The number of passes with which tokens come fastest.

        Args:
            own: per sequence, the chances of the draft tokens at hand; never rising.
            its: the same of the head's tokens; empty where it cannot be asked.
            num_rows: of the step without drafts.
            num_tokens: what the step gives without drafts.
            seconds_of: what a step of so many rows takes; None while that is not known.
        """
        most = max(map(len, its), default=0)
        if not most:
            return HeadAsk([], 0)
        askable = [index for index, chances in enumerate(its) if chances]
        if seconds_of is None or not self._times.is_known:
            return self._asked(HeadAsk(askable, most))
        gaining = [index for index in askable if _adds(own[index], its[index])]
        best, found = goodput(own, num_rows, num_tokens, seconds_of), HeadAsk([], 0)
        for num_passes in range(1, most + 1) if gaining else ():
            chances = [_better(a, b[:num_passes]) for a, b in zip(own, its, strict=True)]
            head_s = num_passes * self._times.seconds(len(gaining))
            slower = partial(_later, seconds_of, head_s)
            rate = goodput(chances, num_rows, num_tokens, slower)
            # Every further pass gives less than the one before.
            if rate <= best:
                break
            best, found = rate, HeadAsk(gaining, num_passes)
        if not found.num_passes and self._num_steps_without >= _PROBE_INTERVAL_STEPS:
            turn = self._num_steps_without % len(askable)
            found = HeadAsk([askable[turn]], 1, is_probe=True)
        return self._asked(found)

    def _asked(self, ask: HeadAsk) -> HeadAsk:
        self._num_steps_without = 0 if ask.num_passes else self._num_steps_without + 1
        return ask


def _later(seconds_of: Callable[[int], float], seconds: float, num_rows: int) -> float:
    return seconds_of(num_rows) + seconds


def _adds(own: Sequence[float], its: Sequence[float]) -> bool:
    return any(b > a for a, b in zip_longest(own, its, fillvalue=0.0))


def _better(own: Sequence[float], its: Sequence[float]) -> list[float]:
    return [max(pair) for pair in zip_longest(own, its, fillvalue=0.0)]
