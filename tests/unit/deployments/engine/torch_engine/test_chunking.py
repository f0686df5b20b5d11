from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.torch_engine.chunking import share_budget

LENGTHS = st.lists(st.integers(1, 2000), max_size=12)
BUDGET = st.integers(0, 600)


@given(LENGTHS, BUDGET)
def test_budget_is_spent_and_not_exceeded(lengths, budget):
    shares = share_budget(lengths, budget)
    assert all(0 <= share <= length for share, length in zip(shares, lengths, strict=True))
    assert sum(shares) == min(budget, sum(lengths))


@given(LENGTHS.filter(bool), BUDGET)
def test_the_first_in_line_gets_half(lengths, budget):
    assert share_budget(lengths, budget)[0] >= min(lengths[0], budget / 2)


@given(LENGTHS, LENGTHS, st.integers(1, 2000), BUDGET)
def test_only_shorter_ones_and_the_first_delay_a_prefill(before, behind, length, budget):
    lengths = [*before, length, *behind]
    if not before:
        return
    first = min(before[0], budget - budget // 2)
    shorter = sum(each for each in [*before[1:], *behind] if each <= length)
    left = budget - first - shorter - (before[0] - first if before[0] - first <= length else 0)
    assert share_budget(lengths, budget)[len(before)] >= min(length, max(0, left))


def test_examples():
    assert share_budget([4000, 20], 512) == [492, 20]
    assert share_budget([4000, 3000, 20], 512) == [256, 236, 20]
    assert share_budget([300, 300, 300], 512) == [300, 212, 0]
    assert share_budget([5], 0) == [0]
