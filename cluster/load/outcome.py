"""What became of one request: the same record whatever surface it went through."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

Ending: TypeAlias = Literal["complete", "rejected", "failed", "unfinished"]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One request of a run; times are seconds from the run's start.

    Attributes:
        index: of the request in its schedule.
        surface: that it went through.
        due_s: when it was to leave; waiting is counted from here, a late generator included.
        sent_s: when it left.
        event_s: when each piece of text came.
        ended_s: when its last event came, or its error.
        num_prompt_tokens: as the server counts, like the two behind it; 0 before its end.
        ending: ``rejected`` is 429 or its gRPC form; anything else that is no whole answer is
            ``failed``, a deadline too. ``unfinished`` until then, and for ever if the run is
            stopped.
        error: why there is no whole answer.
    """

    index: int
    surface: str
    due_s: float
    sent_s: float = 0.0
    event_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    ending: Ending = "unfinished"
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """Seconds from when it was due to its first text."""
        return self.event_s[0] - self.due_s

    @property
    def tpot_s(self) -> float:
        """Seconds a token behind the first event, 0 for one event alone."""
        others = max(1, self.num_output_tokens - 1)
        return (self.event_s[-1] - self.event_s[0]) / others

    @property
    def gaps_s(self) -> Sequence[float]:
        """Seconds between neighbouring pieces; one may hold several tokens."""
        return [later - earlier for earlier, later in pairwise(self.event_s)]
