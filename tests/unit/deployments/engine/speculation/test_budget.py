import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.budget import (
    INITIAL_ACCEPTANCE,
    goodput,
    update_acceptance,
)


@given(st.floats(0, 1), st.booleans(), st.floats(0, 1))
def test_estimate_stays_a_chance(acceptance, was_right, weight):
    updated = update_acceptance(acceptance, was_right, weight)
    assert 0.0 <= updated <= 1.0
    assert updated >= acceptance or not was_right


def test_estimate_converges_to_the_true_chance():
    acceptance = INITIAL_ACCEPTANCE
    values = []
    for turn in range(300):
        acceptance = update_acceptance(acceptance, turn % 2 == 1, 0.1)
        values.append(acceptance)
    assert sum(values[-100:]) / 100 == pytest.approx(0.5, abs=0.01)


def test_no_draft_is_verified_where_every_row_costs_a_step():
    assert goodput([[0.9, 0.8], [0.7]], 2, 2, lambda rows: float(rows)).lengths == [0, 0]


def test_all_are_verified_where_rows_are_free():
    assert goodput([[0.9, 0.8], [0.1]], 2, 2, lambda rows: 1.0).lengths == [2, 1]


def test_the_likeliest_tokens_of_all_sequences_get_the_rows_that_are_free():
    seconds = lambda rows: 1.0 if rows <= 5 else 10.0  # noqa: E731
    assert goodput([[0.9, 0.2], [0.8, 0.7, 0.6]], 2, 2, seconds).lengths == [1, 2]


def test_a_long_prefill_hides_drafts():
    """A row more matters little to a step of hundreds; without them it would not pay."""
    seconds = lambda rows: 0.001 * rows  # noqa: E731
    assert goodput([[0.6]], 1, 1, seconds).lengths == [0]
    assert goodput([[0.6]], 512, 1, seconds).lengths == [1]


@given(
    st.lists(st.lists(st.floats(0, 1), max_size=6), max_size=5),
    st.lists(st.floats(0.01, 1), min_size=40, max_size=40),
)
def test_no_other_number_of_rows_promises_more(chances, increments):
    chances = [sorted(own, reverse=True) for own in chances]
    times = [sum(increments[: n + 1]) for n in range(40)]
    base = max(1, len(chances))
    lengths = goodput(chances, base, base, times.__getitem__).lengths

    def rate(chosen: list[int]) -> float:
        tokens = base + sum(sum(own[:n]) for own, n in zip(chances, chosen, strict=True))
        return tokens / times[base + sum(chosen)]

    best = rate(lengths)
    for index, own in enumerate(chances):
        for length in range(len(own) + 1):
            other = [*lengths[:index], length, *lengths[index + 1 :]]
            if sum(other) == sum(lengths):
                continue
            assert rate(other) <= best * (1 + 1e-9)
