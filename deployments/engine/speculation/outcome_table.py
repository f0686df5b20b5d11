"""The next draft for each likely outcome of a round, kept where the outcome becomes known.

A row is a *continuation* of the text at ``base_len``: the accepted part of the draft in flight, the
bonus token and the draft behind it. A lookup walks the tokens committed since ``base_len`` along
the rows. So a table that arrives a round late still serves wherever its text agrees, and a stale
one can never propose anything: text is only ever appended, and a row that disagrees does not match.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from deployments.engine.speculation.types import DraftTree, OutcomeRow


@dataclass(frozen=True, slots=True)
class OutcomeTable:
    """The rows for one round of one session.

    Attributes:
        base_len: committed tokens when the round began.
        continuations: what each row says follows them, likeliest first.
    """

    base_len: int
    continuations: tuple[tuple[int, ...], ...]

    @classmethod
    def build(cls, base_len: int, in_flight: DraftTree, rows: Iterable[OutcomeRow]) -> OutcomeTable:
        """Anchor a drafter's rows at the text they continue."""
        return cls(
            base_len,
            tuple(
                (
                    *(in_flight.token_ids[node] for node in in_flight.path_to(row.node)),
                    row.bonus_token_id,
                    *row.draft_token_ids,
                )
                for row in rows
            ),
        )

    def draft_after(self, committed: Sequence[int]) -> tuple[int, ...]:
        """The draft of the likeliest row that agrees with the text.

        Args:
            committed: the whole committed text.

        Returns:
            Tokens that may follow it; empty if no row agrees or none goes further.
        """
        if len(committed) < self.base_len:
            return ()
        since = tuple(committed[self.base_len :])
        for continuation in self.continuations:
            if len(continuation) > len(since) and continuation[: len(since)] == since:
                return continuation[len(since) :]
        return ()


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

    def draft_after(self, committed: Sequence[int]) -> tuple[int, ...]:
        """What the newest table that fits proposes; empty if none does."""
        for table in self._tables:
            if draft := table.draft_after(committed):
                return draft
        return ()
