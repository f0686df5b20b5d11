"""A drafter that is never right, but whose rows fit: the worst a target can be sent."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.engine.speculation.drafters.base import Drafter
from tests.bench.split.pool import hosted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import DraftQuery, OutcomeRow, SessionSpec

WRONG_TOKEN_ID = 3
"""Of the default model: the name of a repository follows. No answer of a chat has it."""


class WrongDrafter(Drafter):
    """Foresees bonus tokens as well as another drafter, and drafts nonsense behind them.

    Without the bonus tokens no row would ever be verified, and nothing would have to be refused.

    Args:
        inner: the other one; by default the one that comes with the default model.
    """

    def __init__(self, inner: Drafter | None = None) -> None:
        self._inner = inner or hosted("student", num_threads=1)

    def open(self, session: SessionSpec) -> None:
        """Hand on."""
        self._inner.open(session)

    def append(self, session_id: int, token_ids: Sequence[int]) -> None:
        """Hand on."""
        self._inner.append(session_id, token_ids)

    def close(self, session_id: int) -> None:
        """Hand on."""
        self._inner.close(session_id)

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """As many tokens as were asked for, all wrong."""
        return [
            [
                replace(row, draft_token_ids=(WRONG_TOKEN_ID,) * query.num_draft_tokens)
                for row in rows
            ]
            for query, rows in zip(queries, self._inner.propose(queries), strict=True)
        ]
