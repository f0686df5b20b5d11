"""Drawing from few candidates gives the token that drawing from all of them gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deployments.engine.speculation.noise import gumbel, row_key
from deployments.engine.torch_engine.drawing import draw, draw_from_all
from deployments.engine.torch_engine.kernels.noise import smallest_bits, tokens_above

KEYS = [row_key(seed, 0, 100 + seed) for seed in range(300)]


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 12.0])
def test_the_winner_is_the_same(spread):
    generator = torch.Generator().manual_seed(4)
    scores = torch.randn(300, 3000, generator=generator, dtype=torch.float64) * spread
    expected = draw_from_all(scores, KEYS)
    assert draw(scores, KEYS) == expected
    likeliest = scores.topk(64, dim=1).indices.tolist()
    outsiders = sum(token not in best for token, best in zip(expected, likeliest, strict=True))
    assert (outsiders > 30) == (spread < 10)


def test_excluded_tokens_never_win():
    scores = torch.full((300, 500), -torch.inf, dtype=torch.float64)
    scores[:, 7::100] = torch.arange(5, dtype=torch.float64)
    assert draw(scores, KEYS) == draw_from_all(scores, KEYS)
    assert {token % 100 for token in draw(scores, KEYS)} == {7}


def test_a_vocabulary_smaller_than_the_candidates_is_drawn_from():
    scores = torch.zeros(300, 5, dtype=torch.float64)
    assert draw(scores, KEYS) == draw_from_all(scores, KEYS)
    assert set(draw(scores, KEYS)) == set(range(5))


@pytest.mark.parametrize("temperature", [1e-5, 0.3, 0.8, 1.7, 50.0])
def test_raw_logits_give_what_their_scores_give(temperature):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(300, 3000, generator=generator) * 3
    logits[:, ::3] = -torch.inf
    scores = logits.to(torch.float64) / temperature
    assert draw(logits, KEYS, [temperature] * 300) == draw_from_all(scores, KEYS)


@pytest.mark.parametrize("temperature", [1e-30, 1e-308, 1e-320])
def test_hardly_any_temperature_is_greedy(temperature):
    logits = torch.randn(300, 500, generator=torch.Generator().manual_seed(7))
    assert draw(logits, KEYS, [temperature] * 300) == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("noise", [-3.0, 0.0, 5.0, 9.0])
def test_no_token_that_would_win_is_missed_and_few_others_come_along(noise):
    ids = np.empty(20_000, dtype=np.int64)
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    best = float(scores.max())
    for key in KEYS[:5]:
        bound = smallest_bits(noise)
        count = tokens_above(np.uint64(key), bound, scores.numpy(), best, 1.0, ids)
        own = gumbel([key], torch.arange(20_000))[0]
        found = set(ids[:count].tolist())
        assert set((own + scores >= noise + best).nonzero().squeeze(1).tolist()) <= found
        # The bound is right to an eighth.
        assert found <= set((own + scores >= noise + best - 0.126).nonzero().squeeze(1).tolist())


def test_the_largest_noise_there_is_is_not_missed_and_beyond_it_nothing_wins():
    assert smallest_bits(-3.0)[8 * 39] < 2**52
    assert smallest_bits(-3.6)[-1] >= 2**52 - 16
