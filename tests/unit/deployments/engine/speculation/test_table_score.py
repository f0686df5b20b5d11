"""What tables were worth, by the text that followed."""

from __future__ import annotations

import pytest

from deployments.engine.speculation.table_score import TableScore
from deployments.engine.speculation.types import DraftTree, OutcomeRow

TEXT = [1, 2, 3]
IN_FLIGHT = DraftTree((4, 5, 9), (-1, 0, -1))
ROWS = [
    OutcomeRow(1, 6, (7, 8)),
    OutcomeRow(0, 5, (1, 1)),
    OutcomeRow(0, 7, (8, 9)),
    OutcomeRow(-1, 3, (3, 3)),
]


def score_of(behind: list[int], rows=ROWS, at: float = 1.0, arrived_at: float = 2.0) -> TableScore:
    """One table, and the text token by token."""
    score = TableScore()
    score.told(len(TEXT), IN_FLIGHT, rows, at)
    for length in range(1, len(behind) + 1):
        score.grew(TEXT + behind[:length], arrived_at)
    return score


@pytest.mark.parametrize(
    ("behind", "confirmed"),
    [
        ([4, 5, 6, 7, 8], 2),
        ([4, 5, 6, 7, 1], 1),
        ([4, 5, 6, 1], 0),
        ([4, 7, 8, 1], 1),
        ([9, 1], 0),  # no row for this outcome
        ([4, 5, 1], 0),
        ([3, 3, 3], 2),
        ([8], 0),
    ],
)
def test_the_row_that_came_true_counts_as_far_as_it_is_right(behind, confirmed):
    score = score_of(behind)
    assert (score.num_rounds, score.num_confirmed) == (1, confirmed)


@pytest.mark.parametrize("behind", [[], [4], [4, 5], [4, 5, 6], [4, 5, 6, 7]])
def test_a_table_is_not_judged_before_the_text_tells(behind):
    score = score_of(behind)
    assert (score.num_rounds, score.num_confirmed) == (0, 0)


def test_an_empty_table_and_one_never_made_are_worth_nothing():
    score = score_of([4, 5, 6], rows=[])
    score.missed()
    assert (score.num_rounds, score.num_confirmed) == (2, 0)


def test_a_table_made_when_the_next_round_had_begun_is_worth_nothing():
    score = score_of([4, 5, 6, 7, 8], at=3.0, arrived_at=2.0)
    assert (score.num_rounds, score.num_confirmed) == (1, 0)


def test_tables_are_judged_one_by_one_as_the_text_grows():
    score = TableScore()
    text = [1, 2, 3]
    for token in range(4, 12):
        score.told(len(text), DraftTree(), [OutcomeRow(-1, token, (token + 1,))], 1.0)
        text = [*text, token]
        score.grew(text, 2.0)
    # The last one's draft has not been put to the test.
    assert (score.num_rounds, score.num_confirmed) == (7, 7)
