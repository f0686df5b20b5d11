"""Two drafters behind one interface."""

from __future__ import annotations

import pytest

from deployments.engine.speculation.canary import DrafterRole
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.drafters.canary import CanaryDrafter, draw
from deployments.engine.speculation.table_score import TableScore
from deployments.engine.speculation.types import DraftSampling, OutcomeRow, SessionSpec
from tests.fakes_speculation import VOCAB_SIZE, query_of


class Named(Drafter):
    """Proposes its own number; notes what it is told."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.opened: dict[int, tuple[int, ...]] = {}
        self.closed: list[int] = []
        self.is_broken = False

    def open(self, session):
        if self.is_broken:
            raise ZeroDivisionError
        self.opened[session.session_id] = session.token_ids

    def close(self, session_id):
        self.closed.append(session_id)

    def propose(self, queries):
        if self.is_broken:
            raise ZeroDivisionError
        assert {query.session_id for query in queries} <= self.opened.keys()
        return [[OutcomeRow(-1, self.number, (query.session_id,))] for query in queries]


def spec(number: int) -> SessionSpec:
    return SessionSpec(
        session_id=number,
        request_id=f"request-{number}",
        tenant="t",
        token_ids=(1, 2),
        sampling=DraftSampling(seed=0),
    )


@pytest.fixture
def pair():
    return Named(1), Named(2)


def canary_of(pair, share=0.5, num_sessions=20) -> CanaryDrafter:
    canary = CanaryDrafter(*pair, share=share, vocab_size=VOCAB_SIZE)
    for number in range(num_sessions):
        canary.open(spec(number))
    return canary


def guesses(canary, numbers) -> list[int]:
    rows = canary.propose([query_of(number, [1, 2, 3]) for number in numbers])
    assert [row.draft_token_ids for [row] in rows] == [(number,) for number in numbers]
    return [row.bonus_token_id for [row] in rows]


def test_a_session_is_drafted_by_one_of_the_two_in_any_order_of_queries(pair):
    canary = canary_of(pair)
    expected = [2 if draw(f"request-{number}") < 0.5 else 1 for number in range(20)]
    assert set(expected) == {1, 2}
    assert guesses(canary, range(20)) == expected
    assert guesses(canary, range(19, -1, -1)) == expected[::-1]
    assert canary.propose([]) == []


def test_the_share_is_kept():
    drawn = sum(draw(f"{number:x}-0") < 0.1 for number in range(10_000))
    assert 900 < drawn < 1100


def test_scores_are_told_apart_by_who_drafted(pair):
    canary = canary_of(pair)
    score = TableScore()
    score.num_rounds, score.num_confirmed = 4, 3
    by_role = [canary.learn(number, score) for number in range(20)]
    for role, drafter in zip((DrafterRole.STABLE, DrafterRole.CANDIDATE), pair, strict=True):
        tally = canary.tallies[role]
        assert tally.num_sessions == by_role.count(role) == len(drafter.opened)
        assert tally.num_rounds == 4 * by_role.count(role)
        assert tally.num_confirmed == 3 * by_role.count(role)


def test_a_candidate_that_fails_is_replaced_in_the_same_call_and_for_good(pair):
    stable, candidate = pair
    canary = canary_of(pair)
    candidate.is_broken = True
    assert guesses(canary, range(10)) == [1] * 10
    assert canary.failure == "Named raised ZeroDivisionError"
    assert stable.opened[next(iter(candidate.opened))] == (1, 2, 3)
    candidate.is_broken = False
    assert guesses(canary, range(20)) == [1] * 20
    canary.open(spec(99))
    assert 99 in stable.opened


@pytest.mark.parametrize("number", [VOCAB_SIZE, 1.0, "1", None])
def test_a_row_that_answers_nothing_is_a_failure(pair, number):
    pair[1].number = number
    canary = canary_of(pair, share=0.99)
    assert guesses(canary, range(5)) == [1] * 5
    assert canary.failure == "5 rows answer nothing"


@pytest.mark.parametrize("answer", [None, [None] * 5])
def test_an_answer_that_is_none_is_a_failure(pair, answer):
    canary = canary_of(pair, share=0.99)
    pair[1].propose = lambda queries: answer
    assert guesses(canary, range(5)) == [1] * 5
    assert canary.failure == "Named raised TypeError"


@pytest.mark.parametrize("method", ["append", "close"])
def test_a_candidate_that_fails_at_what_it_is_told_fails_alone(pair, method):
    canary = canary_of(pair, share=0.99)
    setattr(pair[1], method, lambda *_: 1 / 0)
    canary.append(1, [3])
    canary.close(2)
    assert canary.failure == "Named raised ZeroDivisionError"
    assert guesses(canary, [1]) == [1]


def test_a_candidate_that_cannot_open_a_session_leaves_it_to_the_other(pair):
    stable, candidate = pair
    candidate.is_broken = True
    canary = canary_of(pair, share=0.99)
    assert canary.failure is not None
    assert len(stable.opened) == 20


def test_sessions_are_closed_where_they_were_opened(pair):
    stable, candidate = pair
    canary = canary_of(pair)
    stable.closed.clear()
    for number in range(20):
        canary.close(number)
    canary.close(404)
    assert set(candidate.closed) == set(candidate.opened)
    assert set(stable.closed) == {*stable.opened, 404}


def test_what_the_stable_drafter_held_of_a_drawn_session_is_freed(pair):
    stable, candidate = pair
    for number in range(20):
        stable.open(spec(number))
    canary_of(pair)
    assert stable.closed == list(candidate.opened)


def test_a_failing_stable_drafter_is_not_hidden(pair):
    canary = canary_of(pair)
    pair[0].is_broken = True
    with pytest.raises(ZeroDivisionError):
        canary.propose([query_of(number, [1, 2, 3]) for number in range(20)])
    assert canary.failure is None
