from __future__ import annotations

import pytest
import torch

from deployments.engine.training.losses import LOSSES, acceptance, cross_entropy, hybrid, kl
from tests.unit.deployments.engine.training.tiny_training import batch, objective

TEACHER = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]]).log()
DRAFT = torch.tensor([[0.1, 0.2, 0.7], [0.25, 0.25, 0.5]]).log()


def test_the_losses_are_what_they_are_called():
    p, q = TEACHER.exp(), DRAFT.exp()
    torch.testing.assert_close(cross_entropy(DRAFT, TEACHER), -(p * q.log()).sum(-1))
    torch.testing.assert_close(kl(DRAFT, TEACHER), (p * (p / q).log()).sum(-1))
    # 0.1 + 0.2 + 0.1 of the first row are shared, all of the second.
    torch.testing.assert_close(acceptance(DRAFT, TEACHER), -torch.tensor([0.4, 1.0]).log())


@pytest.mark.parametrize("name", ["kl", "acceptance", "hybrid"])
def test_a_draft_that_says_the_same_has_nothing_to_learn(name):
    logits = (DRAFT + 3.0).clone().requires_grad_()
    loss = LOSSES[name](logits, DRAFT)
    torch.testing.assert_close(loss, torch.zeros(2), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(2, 3), rtol=0, atol=1e-6)


def test_the_hybrid_is_between_divergence_and_what_is_not_accepted():
    weight = torch.tensor(-3 * 0.4).exp()
    expected = weight * kl(DRAFT, TEACHER)[0] + (1 - weight) * 0.6
    torch.testing.assert_close(hybrid(DRAFT, TEACHER)[0], expected)


def test_the_distance_of_both_streams_is_added_by_its_weight():
    whole = batch(2)
    losses = []
    for weight in (0.0, 0.1, 0.3):
        trained = objective(hidden_weight=weight)
        with torch.no_grad():
            losses.append(trained(whole, trained.count(whole)).loss)
    assert losses[0] < losses[1]
    torch.testing.assert_close(losses[2] - losses[0], 3 * (losses[1] - losses[0]))
