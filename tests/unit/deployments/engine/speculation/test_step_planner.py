"""What a step verifies, and that finding it out stays cheap."""

import pytest

from deployments.engine.speculation.step_planner import AtHand, StepPlanner


def play(planner, batch, num_steps, seconds_of, *, chance, withheld=None):
    """Seconds and draft tokens of steps whose drafts of four are all as likely as told."""
    withheld = withheld if withheld is not None else [0] * batch
    spent, verified = 0.0, []
    for _ in range(num_steps):
        drafts = [
            AtHand([chance**depth for depth in range(1, 5)], rounds >= 16) for rounds in withheld
        ]
        lengths = planner.plan(drafts, batch, batch, {}).lengths
        for index, length in enumerate(lengths):
            withheld[index] = 0 if length else withheld[index] + 1
        seconds = seconds_of(batch + sum(lengths))
        planner.observe(batch + sum(lengths), seconds)
        spent += seconds
        verified.append(sum(lengths))
    return spent, verified


def linear(rows):
    return 0.01 * rows


def flat(rows):
    return 0.01


@pytest.mark.parametrize("batch", [1, 3, 8, 32])
def test_where_drafts_do_not_pay_trials_cost_a_hundredth(batch):
    plain_s = linear(batch)
    spent, verified = play(StepPlanner(), batch, 3000, linear, chance=0.2)
    first = 8 + 12  # what may be saved up, and until the curve is known
    assert spent <= 3000 * plain_s * 1.01 + first * plain_s
    assert sum(verified[1500:]) > 0, "it goes on trying"


@pytest.mark.parametrize("batch", [1, 8])
def test_where_drafts_pay_everything_is_verified(batch):
    _, verified = play(StepPlanner(), batch, 200, flat, chance=0.9)
    assert verified[-50:] == [4 * batch] * 50


def test_a_machine_that_got_faster_is_noticed():
    planner, withheld = StepPlanner(), [0] * 4
    play(planner, 4, 1000, linear, chance=0.6, withheld=withheld)
    _, verified = play(planner, 4, 3000, flat, chance=0.6, withheld=withheld)
    assert verified[-50:] == [16] * 50


def test_a_machine_that_got_slower_is_noticed_at_once():
    planner = StepPlanner()
    play(planner, 4, 300, flat, chance=0.6)
    _, verified = play(planner, 4, 100, linear, chance=0.2)
    assert sum(verified[50:]) < 50


def test_nobody_misses_a_target_because_of_a_trial():
    planner = StepPlanner()
    play(planner, 2, 40, linear, chance=0.2)
    for _ in range(400):
        planner.observe(2, linear(2))  # trials are saved up
    due = [AtHand((0.2,), is_due=True)] * 2
    assert planner.plan(due, 2, 2, {}).lengths == [1, 1]
    assert planner.plan(due, 2, 2, {0: 0.035}).lengths == [1, 0]
    assert planner.plan(due, 2, 2, {0: 0.021, 1: 1.0}).lengths == [0, 0]
    assert planner.plan(due, 2, 2, {0: 0.001}).lengths == [1, 1], "missed in any case"


def test_drafts_that_pay_are_no_trials_cost():
    planner = StepPlanner()

    def step(drafts):
        lengths = planner.plan(drafts, 4, 4, {}).lengths
        planner.observe(4 + sum(lengths), 0.01 + 0.002 * sum(lengths))
        return lengths

    good = [AtHand((0.95, 0.9, 0.85, 0.8))] * 3
    for _ in range(40):
        step([*good, AtHand((0.01,))])
    tried = [step([*good, AtHand((0.01,), is_due=number % 16 == 0)])[3] for number in range(320)]
    assert sum(tried) >= 10, "as good as all of its twenty turns"
