"""Texts, and a drafter that is right as often as it is told to be."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.types import OutcomeRow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.engine.speculation.types import DraftQuery, SessionSpec

VOCAB_SIZE = 1_000
_FIRST_BONUS = 0.6
_BONUS_DECAY = 0.7
"""Chance of the first guess of a bonus token behind a wrong draft, and how misses fade with more
guesses (a power law, as Saguaro measures it, arXiv:2603.03251); assumed."""


class Text:
    """A sequence's tokens, and for every place one throw of the dice of its drafter.

    Args:
        seed: the same one gives the same text and throws.
    """

    def __init__(self, seed: int, length: int) -> None:
        rng = Random(seed)  # noqa: S311 - to be repeated
        self.token_ids = [rng.randrange(VOCAB_SIZE) for _ in range(length)]
        self._draft_throws = [rng.random() for _ in range(length)]
        self._bonus_throws = [rng.random() for _ in range(length)]

    def drafted(self, start: int, count: int, acceptance: float) -> tuple[int, ...]:
        """What is guessed from ``start`` on; wrong tokens too."""
        return tuple(
            self._said(place, is_right=self._draft_throws[place] < acceptance)
            for place in range(start, min(start + count, len(self.token_ids)))
        )

    def bonus(self, place: int, fanout: int) -> int:
        """The best of ``fanout`` guesses of a token that the draft in flight got wrong."""
        chance = 1 - (1 - _FIRST_BONUS) * fanout**-_BONUS_DECAY
        return self._said(place, is_right=self._bonus_throws[place] < chance)

    def _said(self, place: int, *, is_right: bool) -> int:
        token_id = self.token_ids[place]
        return token_id if is_right else (token_id + 1) % VOCAB_SIZE


class DiceDrafter(Drafter):
    """Guesses by the throws of each text.

    Args:
        texts: by request id.
        spend: told the forwards of each batch and the rows of one.
    """

    def __init__(
        self, texts: dict[str, Text], acceptance: float, spend: Callable[[int, int], None]
    ) -> None:
        self._texts = texts
        self._acceptance = acceptance
        self._spend = spend
        self._open: dict[int, Text] = {}

    def open(self, session: SessionSpec) -> None:
        """Find the text."""
        self._open[session.session_id] = self._texts[session.request_id]

    def close(self, session_id: int) -> None:
        """Forget it."""
        self._open.pop(session_id, None)

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """Rows for the outcomes that can be true; the time is that of all that were asked."""
        num_forwards = 1 + max(query.num_draft_tokens for query in queries)
        num_rows = sum(
            query.fanout * (len(query.in_flight) + 1) if len(query.in_flight) else 1
            for query in queries
        )
        self._spend(num_forwards, num_rows)
        return [self._rows(query) for query in queries]

    def _rows(self, query: DraftQuery) -> list[OutcomeRow]:
        text, at = self._open[query.session_id], len(query.token_ids)
        num_nodes = len(query.in_flight)
        rows = []
        for node in range(-1, num_nodes):
            place = at + node + 1
            if place >= len(text.token_ids):
                break
            if node >= 0 and query.in_flight.token_ids[node] != text.token_ids[place - 1]:
                break
            # Behind a whole draft the next token is drafted as any; else the draft was wrong here.
            is_end = node == num_nodes - 1
            bonus = (
                text.drafted(place, 1, self._acceptance)[0]
                if is_end
                else text.bonus(place, query.fanout)
            )
            draft = text.drafted(place + 1, query.num_draft_tokens, self._acceptance)
            rows.append(OutcomeRow(node, bonus, draft))
        return rows[::-1]
