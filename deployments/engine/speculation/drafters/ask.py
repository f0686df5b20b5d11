"""The one place where drafters are called: what they raise or get wrong becomes one error."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.speculation.errors import DrafterFailedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.speculation.types import DraftQuery, OutcomeRow


class Answers(NamedTuple):
    """What a drafter said.

    Attributes:
        rows: for each query, in order; cut to what was asked.
        num_bad_rows: left out, for they answer nothing: a node that is not in flight, a token id
            that is no integer of the vocabulary, or chances outside 0 to 1 or more than tokens.
    """

    rows: list[list[OutcomeRow]]
    num_bad_rows: int


@contextmanager
def calling(drafter: Drafter) -> Iterator[None]:
    """Turns whatever a drafter raises into DrafterFailedError."""
    try:
        yield
    except DrafterFailedError:
        raise
    except Exception as error:
        message = f"{type(drafter).__name__} raised {type(error).__name__}"
        raise DrafterFailedError(message) from error


def ask(drafter: Drafter, queries: Sequence[DraftQuery], vocab_size: int) -> Answers:
    """The drafter's rows, checked against the queries. A bad row costs no other one.

    Raises:
        DrafterFailedError: it raised, or its answer is not a list of rows for each query.
    """
    with calling(drafter):
        answers = [
            rows[: (len(query.in_flight) + 1) * query.fanout]
            for query, rows in zip(queries, drafter.propose(queries), strict=True)
        ]
        checked = [
            [_cut(row, query) for row in rows if _is_answer(row, query, vocab_size)]
            for query, rows in zip(queries, answers, strict=True)
        ]
    return Answers(checked, sum(map(len, answers)) - sum(map(len, checked)))


def _is_answer(row: OutcomeRow, query: DraftQuery, vocab_size: int) -> bool:
    token_ids, chances = row.token_ids, row.chances
    return (
        {type(row.node), *map(type, token_ids)} == {int}
        and -1 <= row.node < len(query.in_flight)
        and min(token_ids) >= 0
        and max(token_ids) < vocab_size
        and len(chances) <= len(token_ids)
        and all(0 <= one <= 1 for one in chances)
    )


def _cut(row: OutcomeRow, query: DraftQuery) -> OutcomeRow:
    if len(row.draft_token_ids) <= query.num_draft_tokens:
        return row
    return replace(
        row,
        draft_token_ids=row.draft_token_ids[: query.num_draft_tokens],
        chances=row.chances[: query.num_draft_tokens + 1],
    )
