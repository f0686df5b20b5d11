"""When a sequence asks the pool, and when a draft of it is due for a trial."""

from __future__ import annotations

from deployments.engine.speculation.running_sequence import RunningSequence
from deployments.engine.speculation.types import (
    DraftOrigin,
    DraftSampling,
    DraftTree,
    SessionSpec,
)

NOTHING = DraftTree()
FROM_POOL = DraftTree((7,), (-1,), (DraftOrigin.POOL,))
COPIED = DraftTree((7,), (-1,), (DraftOrigin.LOCAL,))


def sequence() -> RunningSequence:
    sampling = DraftSampling(seed=1, choice_index=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    spec = SessionSpec(
        session_id=1, request_id="r", tenant="t", token_ids=(1, 2), sampling=sampling
    )
    return RunningSequence(spec, {})


def rounds(running: RunningSequence, count: int, verified: DraftTree = NOTHING) -> list[int]:
    """In which rounds the pool was asked, if it has a row in each that follows such a round."""
    asked, has_row = [], True
    for number in range(count):
        running.on_round(verified, had_draft=has_row, had_pool_row=has_row)
        has_row = running.asks_pool()
        if has_row:
            asked.append(number)
    return asked


def test_a_pool_whose_tokens_are_verified_is_asked_in_every_round() -> None:
    assert rounds(sequence(), 40, FROM_POOL) == list(range(40))


def test_a_pool_whose_tokens_are_left_out_is_asked_once_in_sixteen_rounds() -> None:
    assert rounds(sequence(), 64) == [0, 1, 2, 14, 30, 46, 62]


def test_what_was_asked_again_is_there_when_a_trial_is_due() -> None:
    running = sequence()
    asked = rounds(running, 15)
    assert asked[-1] == 14
    assert not running.is_due()
    running.on_round(NOTHING, had_draft=True, had_pool_row=True)
    assert running.is_due()


def test_a_verified_token_of_the_pool_wakes_it() -> None:
    running = sequence()
    rounds(running, 8)
    assert not running.asks_pool()
    running.on_round(FROM_POOL, had_draft=True, had_pool_row=True)
    assert running.asks_pool()
    assert not running.is_due()


def test_copies_that_are_verified_do_not_keep_a_pool_at_work() -> None:
    assert rounds(sequence(), 20, COPIED) == [0, 1, 2, 14]


def test_rounds_without_a_row_that_fits_say_nothing_of_the_pool() -> None:
    running = sequence()
    for _ in range(40):
        running.on_round(NOTHING, had_draft=False, had_pool_row=False)
        assert running.asks_pool()
    assert not running.is_due()


def test_a_pool_without_a_row_is_asked_once_in_sixteen_rounds() -> None:
    running = sequence()
    running.is_pool_silent = True
    asked = []
    for number in range(40):
        running.on_round(NOTHING, had_draft=False, had_pool_row=False)
        if running.asks_pool():
            asked.append(number)
    assert asked == [0, 1, 2, 14, 30]


def test_copies_that_are_left_out_become_due() -> None:
    running = sequence()
    for number in range(16):
        assert not running.is_due(), number
        running.on_round(NOTHING, had_draft=True, had_pool_row=False)
    assert running.is_due()
