from __future__ import annotations

import pytest
from pydantic import ValidationError

from deployments.engine.training.config import CostsConfig, DraftTrainingConfig
from deployments.engine.training.evaluation import DraftQuality
from deployments.engine.training.methods import method_of
from deployments.engine.training.step_costs import (
    StepCosts,
    decoding_step,
    rows_needed,
    time_steps,
)
from deployments.engine.training.tree_shape import TreeShape
from tests.unit.deployments.engine.training.tiny_training import target

TREE = TreeShape((2, 2, 1))


def quality(*lengths, tree=2.0):
    return DraftQuality(
        acceptance=(0.5,) * len(lengths),
        mean_acceptance_length=lengths,
        tree_acceptance_length=tree,
        coverage=1.0,
        num_positions=1,
    )


def test_a_speed_up_is_what_a_round_gives_in_its_time():
    costs = StepCosts(target_s={1: 10.0, 2: 11.0, 4: 13.0, 11: 20.0}, draft_s={1: 1.0, 4: 2.5})
    found = costs.speed_ups(quality(1.4, 1.6, 1.7), TREE)
    # Three rows are halfway between two and four.
    expected = (1.4 * 10 / (11 + 1), 1.6 * 10 / (12 + 2), 1.7 * 10 / (13 + 3))
    assert found.chains == pytest.approx(expected)
    # The draft runs over one row, over two and over four.
    assert found.tree == pytest.approx(2.0 * 10 / (20 + 1 + 1.5 + 2.5))
    assert found.best_length == 1


def test_a_draft_that_guesses_nothing_slows_down():
    costs = StepCosts(target_s={1: 10.0, 11: 10.0}, draft_s={1: 1.0})
    found = costs.speed_ups(quality(1.0, 1.0, tree=1.0), TREE)
    assert found.chains == pytest.approx((10 / 11, 10 / 12))
    assert found.tree < 1


def test_the_rows_that_are_measured_are_those_that_are_asked_for():
    target_rows, draft_rows = rows_needed(4, TREE)
    assert target_rows == {1, 2, 3, 4, 5, 11}
    assert draft_rows == {1, 2, 4}


def test_costs_are_kept(tmp_path):
    costs = StepCosts(target_s={1: 0.03, 4: 0.031}, draft_s={1: 0.002})
    costs.write(tmp_path / "costs.json")
    assert StepCosts.read(tmp_path / "costs.json") == costs


def test_given_costs_begin_with_one_row():
    with pytest.raises(ValidationError, match="a step of 1 row is needed"):
        CostsConfig(target_step_s={4: 0.03})


@pytest.mark.parametrize("name", ["eagle3", "student"])
def test_steps_of_target_and_draft_are_run(name):
    settings = {"method": name, "student": {"first_layers": 2, "last_layers": 1}}
    config = DraftTrainingConfig.model_validate(settings)
    loaded = target()
    before = {key: tensor.clone() for key, tensor in loaded.model.state_dict().items()}
    step = method_of(config, loaded.config).drafting_step(loaded, 40)
    for rows in (1, 4):
        (guesses,) = step(rows) if name == "eagle3" else (step(rows),)
        assert len(guesses) == rows
        assert all(0 <= guess < 97 for guess in guesses)
    assert len(decoding_step(loaded)(5)) == 5
    for key, tensor in loaded.model.state_dict().items():
        assert tensor.equal(before[key])


def test_every_width_takes_its_turns():
    tried = []
    times = time_steps(tried.append, {3, 1})
    assert times.keys() == {1, 3}
    assert all(seconds >= 0 for seconds in times.values())
    assert tried[:4] == [1, 3, 1, 3]
