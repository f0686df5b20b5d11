from __future__ import annotations

from itertools import chain

import pytest

from deployments.engine.training.config import TrainingConfig
from deployments.engine.training.plan import GroupedPlan, WholePlan

CONFIG = TrainingConfig(batch_tokens=64, accumulate=2, epochs=3, seed=5)
LENGTHS = [10 + 7 * i % 31 for i in range(37)]


def texts_of(steps):
    return [index for step in steps for batch in step.batches for index in batch]


def grouped(lengths=LENGTHS, asked=None):
    def lengths_of(texts):
        if asked is not None:
            asked.append(texts)
        return [lengths[index] for index in texts]

    return GroupedPlan(len(lengths), 10, lengths_of, CONFIG)


@pytest.mark.parametrize("plan", [WholePlan(LENGTHS, CONFIG), grouped()])
def test_every_epoch_takes_every_text_once(plan):
    steps = list(plan.steps(0))
    taken = texts_of(steps)
    for epoch in range(3):
        assert sorted(taken[epoch * 37 : (epoch + 1) * 37]) == list(range(37))
    assert taken[37:74] != taken[74:]
    ends = [step.end for step in steps]
    assert ends == sorted(set(ends))
    assert ends[-1] == pytest.approx(plan.end)
    assert plan.num_steps == len(steps)
    assert all(len(step.batches) <= 2 for step in steps)
    assert all(
        max(LENGTHS[index] for index in batch) * len(batch) <= 64
        for batch in chain.from_iterable(step.batches for step in steps)
    )


@pytest.mark.parametrize("plan", [WholePlan(LENGTHS, CONFIG), grouped()])
@pytest.mark.parametrize("num_done", [0, 1, 5, 12, 30])
def test_a_plan_goes_on_where_it_was_left(plan, num_done):
    assert list(plan.steps(num_done)) == list(plan.steps(0))[num_done:]


def test_the_first_epoch_asks_for_a_group_when_it_comes_to_it():
    asked = []
    plan = grouped(asked=asked)
    steps = plan.steps(0)
    taken: list[int] = []
    while len(taken) < 10:
        taken += texts_of([next(steps)])
        assert asked == [range(10)]
    assert sorted(taken) == list(range(10))
    assert plan.num_steps is None
    next(steps)
    assert asked == [range(10), range(10, 20)]


def test_a_text_without_an_answer_is_never_taken():
    lengths = [0 if index % 5 == 0 else 20 for index in range(37)]
    lengths[10:20] = [0] * 10
    taken = set(texts_of(grouped(lengths).steps(0)))
    assert taken == {index for index, length in enumerate(lengths) if length}
