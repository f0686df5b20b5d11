import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.budget import (
    INITIAL_ACCEPTANCE,
    draft_length,
    shed_fanout,
    update_acceptance,
)


def test_always_wrong_drafts_shrink_to_one_token_and_grow_again():
    acceptance = INITIAL_ACCEPTANCE
    lengths = []
    for _ in range(12):
        k = draft_length(acceptance, 8)
        lengths.append(k)
        acceptance = update_acceptance(acceptance, 0, k)
    assert lengths[0] > 2
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1
    for _ in range(12):
        k = draft_length(acceptance, 8)
        acceptance = update_acceptance(acceptance, k, k)
    assert draft_length(acceptance, 8) == 8


@pytest.mark.parametrize(
    ("acceptance", "length"), [(0.0, 1), (0.2, 1), (0.5, 2), (0.7, 4), (0.9, 15), (1.0, 32)]
)
def test_draft_length(acceptance, length):
    assert draft_length(acceptance, 32) == length
    assert draft_length(acceptance, 0) == 0


@given(st.floats(0, 1), st.integers(0, 32), st.integers(0, 32))
def test_estimate_stays_a_chance(acceptance, num_drafted, num_accepted):
    num_accepted = min(num_accepted, num_drafted)
    updated = update_acceptance(acceptance, num_accepted, num_drafted)
    assert 0.0 <= updated <= 1.0
    if num_drafted == 0:
        assert updated == acceptance


def test_estimate_converges_to_the_true_chance():
    acceptance = INITIAL_ACCEPTANCE
    values = []
    for turn in range(300):
        acceptance = update_acceptance(acceptance, turn % 2, 1)
        values.append(acceptance)
    assert sum(values[-100:]) / 100 == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("fanout", "num_pending", "granted"),
    [(3, 1, 3), (3, 16, 3), (3, 32, 1), (4, 32, 2), (1, 99, 1)],
)
def test_shed_fanout(fanout, num_pending, granted):
    assert shed_fanout(fanout, num_pending, 16) == granted
