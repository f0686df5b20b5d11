from __future__ import annotations

import pytest
import torch

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.eagle3 import Eagle3Config
from deployments.engine.training.batches import collate
from deployments.engine.training.initial import start_from_target
from deployments.engine.training.training_time_test import unroll
from tests.eagle3_inference import drafted_one_by_one
from tests.unit.deployments.engine.torch_engine.tiny_models import loaded_model
from tests.unit.deployments.engine.training.tiny_training import (
    batch,
    head,
    head_config,
    objective,
    scale,
    target,
    texts,
)

STEPS = 4


def test_unrolled_training_is_step_by_step_inference():
    a_head, text = head(), texts()[0]
    embedding = target().model.embed_tokens.weight
    one = collate([text], torch.device("cpu"), torch.float32)
    with torch.no_grad():
        steps = list(unroll(a_head, embedding, one, STEPS))
    for at in (0, 7, 20):
        expected = drafted_one_by_one(a_head, embedding, text, at, STEPS)
        for step, logits in enumerate(expected):
            found = a_head.logits(steps[step].hidden[0, at])
            torch.testing.assert_close(found, logits, rtol=0, atol=1e-4)


def test_padding_changes_nothing():
    a_head = head()
    embedding = target().model.embed_tokens.weight
    short = texts()[0]._replace(**{n: getattr(texts()[0], n)[:15] for n in texts()[0]._fields})
    both = collate([short, texts()[1]], torch.device("cpu"), torch.float32)
    alone = collate([short], torch.device("cpu"), torch.float32)
    for padded, single in zip(
        unroll(a_head, embedding, both, STEPS), unroll(a_head, embedding, alone, STEPS), strict=True
    ):
        torch.testing.assert_close(padded.hidden[0, :15], single.hidden[0])
        assert padded.is_answer[0].sum() == single.is_answer[0].sum()
        assert not padded.is_answer[0, 15:].any()


def test_each_step_is_taught_by_the_row_that_wrote_its_token():
    a_head = head()
    whole = batch(1)
    for step, drafted in enumerate(unroll(a_head, target().model.embed_tokens.weight, whole, 3)):
        for at in drafted.is_answer[0].nonzero().flatten().tolist():
            # Greedy answers: what the target wanted is what the text holds.
            assert drafted.wanted[0, at] == whole.token_ids[0, at + step + 2]
            torch.testing.assert_close(drafted.teacher[0, at], whole.hidden[0, at + step + 1])


def test_the_teacher_is_the_target():
    whole = batch(2)
    rows = target().model.lm_head.weight
    assert (torch.nn.functional.linear(whole.hidden, rows).argmax(-1) == whole.wanted)[
        whole.is_answer
    ].all()


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "acceptance", "hybrid"])
def test_every_loss_falls_under_gradient_steps(loss):
    trained = objective(loss=loss)
    whole = batch(6)
    optimizer = torch.optim.Adam(trained.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        output = trained(whole, trained.count(whole))
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_batches_of_one_step_add_up_to_one_batch():
    trained = objective()
    whole, first, second = (
        batch(4),
        batch(2),
        collate(texts()[2:4], torch.device("cpu"), torch.float32),
    )
    count = trained.count(whole)
    parts = trained(first, count).loss + trained(second, count).loss
    torch.testing.assert_close(parts, trained(whole, count).loss)


def test_a_start_from_the_target_guesses_better_than_chance():
    fresh, started = head(), head()
    start_from_target(started, target().model, texts(), scale())
    whole = batch(8)
    chance, informed = objective(fresh), objective(started)
    count = chance.count(whole)
    assert informed(whole, count).loss < chance(whole, count).loss
    assert informed(whole, count).right[0] > chance(whole, count).right[0]


def test_targets_that_are_no_larger_than_a_draft_are_refused():
    with pytest.raises(ValueError, match="3 layers"):
        Eagle3Config.for_target(loaded_model("llama").config, 8)
    with pytest.raises(ValueError, match="97 tokens"):
        Eagle3Config.for_target(target().config, 98)
    yarn = loaded_model("qwen2-tied-yarn").config
    with pytest.raises(UnsupportedModelError, match="yarn"):
        Eagle3Config.for_target(yarn, 8)
    assert head_config().capture_layers == (2, 3, 3)
