from __future__ import annotations

from deployments.engine.speculation.head_budget import HeadAsk, HeadBudget

ITS = [[0.8, 0.64, 0.5, 0.4]]
NOTHING = [[]]


def flat(num_rows: int) -> float:
    """A target that has time for more rows."""
    return 0.030


def budget_of(pass_s: float, num_sequences: int = 1) -> HeadBudget:
    budget = HeadBudget()
    for _ in range(4):
        budget.observe(HeadAsk(list(range(num_sequences)), 2), 2 * pass_s)
    return budget


def test_what_is_not_known_is_tried():
    budget = HeadBudget()
    assert budget.plan(NOTHING, ITS, 1, 1, flat) == HeadAsk([0], 4)
    assert budget_of(0.001).plan(NOTHING, ITS, 1, 1, None) == HeadAsk([0], 4)


def test_passes_follow_their_price():
    asked = [
        budget_of(pass_s).plan(NOTHING, ITS, 1, 1, flat).num_passes
        for pass_s in (0.0001, 0.007, 0.010, 0.013, 0.03)
    ]
    assert asked == sorted(asked, reverse=True)
    assert asked[0] == 4
    assert 0 < asked[2] < 4
    assert asked[-1] == 0


def test_a_pass_that_takes_as_much_as_it_gives_is_not_made():
    # One token more with a chance of 0.5 is worth half a step.
    for pass_s, num_passes in ((0.014, 1), (0.016, 0)):
        plan = budget_of(pass_s).plan(NOTHING, [[0.5]], 1, 1, flat)
        assert plan.num_passes == num_passes


def test_rows_that_cost_time_count_as_well():
    def steep(num_rows: int) -> float:
        return 0.030 * num_rows

    assert budget_of(0.0001).plan(NOTHING, ITS, 1, 1, steep).num_passes == 0


def test_the_head_is_asked_for_those_who_have_nothing_better():
    budget = budget_of(0.001, 3)
    own = [[0.9, 0.8], [], [0.1]]
    plan = budget.plan(own, [[0.5, 0.3], [0.5, 0.3], [0.5, 0.3]], 3, 3, flat)
    assert plan.indices == [1, 2]
    assert plan.num_passes == 2
    same = budget.plan([[0.9, 0.8]] * 3, [[0.5, 0.3]] * 3, 3, 3, flat)
    assert same == HeadAsk([], 0)


def test_sequences_without_room_are_left_out():
    assert budget_of(0.001).plan([[], []], [[], [0.5]], 2, 2, flat).indices == [1]
    assert budget_of(0.001).plan([[], []], [[], []], 2, 2, flat) == HeadAsk([], 0)


def test_a_head_that_does_not_pay_is_tried_for_one_token_now_and_then():
    budget = budget_of(1.0)
    plans = [budget.plan([[], []], [[0.5, 0.4], [0.5, 0.4]], 2, 2, flat) for _ in range(260)]
    probes = [plan for plan in plans if plan.num_passes]
    assert len(probes) == 4
    assert all(plan.is_probe and plan.num_passes == len(plan.indices) == 1 for plan in probes)
    # It got faster; probes show it little by little.
    for _ in range(100):
        budget.observe(HeadAsk([0], 1), 0.001)
    plan = budget.plan([[], []], [[0.5, 0.4], [0.5, 0.4]], 2, 2, flat)
    assert plan == HeadAsk([0, 1], 2)
