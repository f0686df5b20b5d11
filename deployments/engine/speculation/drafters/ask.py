"""The one place where drafters are called: what they raise or get wrong becomes one error."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.engine.speculation.errors import DrafterFailedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.speculation.types import DraftQuery, OutcomeRow


@contextmanager
def calling(drafter: Drafter) -> Iterator[None]:
    """Turns whatever a drafter raises into DrafterFailedError."""
    try:
        yield
    except Exception as error:
        message = f"{type(drafter).__name__} raised {type(error).__name__}"
        raise DrafterFailedError(message) from error


def ask(drafter: Drafter, queries: Sequence[DraftQuery], vocab_size: int) -> list[list[OutcomeRow]]:
    """The drafter's rows, checked against the queries and cut to what was asked.

    Raises:
        DrafterFailedError: it raised, or its answer does not fit the queries.
    """
    with calling(drafter):
        answers = drafter.propose(queries)
    if len(answers) != len(queries):
        raise DrafterFailedError(f"{len(answers)} answers to {len(queries)} queries")
    return [_checked(query, rows, vocab_size) for query, rows in zip(queries, answers, strict=True)]


def _checked(query: DraftQuery, rows: list[OutcomeRow], vocab_size: int) -> list[OutcomeRow]:
    num_nodes = len(query.in_flight)
    for row in rows:
        if not -1 <= row.node < num_nodes:
            raise DrafterFailedError(f"a row for node {row.node} of {num_nodes}")
        token_ids = row.token_ids
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise DrafterFailedError("a row with a token id outside the vocabulary")
        if len(row.chances) > len(token_ids) or not all(0 <= one <= 1 for one in row.chances):
            raise DrafterFailedError("a row with chances outside 0 to 1, or more than tokens")
    return [
        row
        if len(row.draft_token_ids) <= query.num_draft_tokens
        else replace(
            row,
            draft_token_ids=row.draft_token_ids[: query.num_draft_tokens],
            chances=row.chances[: query.num_draft_tokens + 1],
        )
        for row in rows[: (num_nodes + 1) * query.fanout]
    ]
