"""The next draft for each likely outcome of a round, kept where the outcome becomes known.

A row is a *continuation* of the text at ``base_len``: the accepted part of the draft in flight, the
bonus token and the draft behind it. A lookup walks the tokens committed since ``base_len`` along
the rows. So a table that arrives a round late still serves wherever its text agrees, and a stale
one can never propose anything: text is only ever appended, and a row that disagrees does not match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from deployments.engine.speculation.types import DraftTree, OutcomeRow


class Continuation(NamedTuple):
    """Tokens that may follow a text, and what their drafter thinks of the first ones.

    Attributes:
        chances: of each that it is right if all before it are; may be fewer, or none at all.
    """

    token_ids: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()


NOTHING = Continuation()


@dataclass(frozen=True, slots=True)
class OutcomeTable:
    """The rows for one round of one session.

    Attributes:
        base_len: committed tokens when the round began.
        continuations: what each row says follows them, likeliest first.
        longest: tokens of the longest one.
    """

    base_len: int
    continuations: tuple[Continuation, ...]
    longest: int

    @classmethod
    def build(cls, base_len: int, in_flight: DraftTree, rows: Iterable[OutcomeRow]) -> OutcomeTable:
        """Anchor a drafter's rows at the text they continue."""
        paths: list[tuple[int, ...]] = [()]
        for token_id, parent in zip(in_flight.token_ids, in_flight.parents, strict=True):
            paths.append((*paths[parent + 1], token_id))
        continuations = []
        for row in rows:
            path, chances = paths[row.node + 1], row.chances
            if path and chances:
                # Of the path the drafter says nothing: the target itself has found out.
                chances = (1.0,) * len(path) + chances
            continuations.append(Continuation(path + row.token_ids, chances))
        longest = max((len(one.token_ids) for one in continuations), default=0)
        return cls(base_len, tuple(continuations), longest)

    def draft_after(self, committed: Sequence[int]) -> Continuation:
        """The draft of the likeliest row that agrees with the text.

        Args:
            committed: the whole committed text.

        Returns:
            Tokens that may follow it; empty if no row agrees or none goes further.
        """
        known = len(committed) - self.base_len
        # A table may be kept long after the last text that it fits: not even looked at then.
        if not 0 <= known < self.longest:
            return NOTHING
        since = tuple(committed[self.base_len :])
        for token_ids, chances in self.continuations:
            if len(token_ids) > known and token_ids[:known] == since:
                return Continuation(token_ids[known:], chances[known:])
        return NOTHING


class TableShelf:
    """The newest tables of one session, two at most."""

    _CAPACITY = 2

    def __init__(self) -> None:
        self._tables: list[OutcomeTable] = []

    def __len__(self) -> int:
        return len(self._tables)

    def put(self, table: OutcomeTable) -> None:
        """Keep a table unless two newer ones are there."""
        self._tables.append(table)
        self._tables.sort(key=lambda kept: kept.base_len, reverse=True)
        del self._tables[self._CAPACITY :]

    def draft_after(self, committed: Sequence[int]) -> Continuation:
        """What the newest table that fits proposes; empty if none does."""
        for table in self._tables:
            if (draft := table.draft_after(committed)).token_ids:
                return draft
        return NOTHING
