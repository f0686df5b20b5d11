from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deployments.engine.torch_engine.sampling_math import process_logits

SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (0.7, 20, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (0.5, 0, 0.3, 0.0),
    (2.0, 0, 1.0, 0.05),
    (1.1, 50, 0.8, 0.02),
    (1.0, 1, 0.5, 0.5),
    (1.0, 100_000, 0.999, 0.0),
]


def reference(logits, temperature, top_k, top_p, min_p):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_setting_equals_transformers_warpers(settings, dtype):
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(3)).to(dtype) * 4
    got = process_logits(logits, *([value] * 6 for value in settings))
    torch.testing.assert_close(got, reference(logits.clone(), *settings), rtol=1e-6, atol=1e-6)


def test_a_mixed_batch_equals_its_rows_one_by_one():
    rows = [*SETTINGS, (0.0, 5, 0.5, 0.5)]
    logits = torch.randn(len(rows), 300, generator=torch.Generator().manual_seed(4)) * 3
    untouched = logits.clone()
    got = process_logits(logits, *map(list, zip(*rows, strict=True)))
    for row, settings in enumerate(rows):
        alone = process_logits(logits[row : row + 1], *([value] for value in settings))
        assert torch.equal(got[row], alone[0])
    assert torch.equal(got[-1], logits[-1])
    assert torch.equal(logits, untouched)


def test_equal_scores_are_kept_or_dropped_together():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    by_k = process_logits(logits, [1.0], [2], [1.0], [0.0])
    assert by_k.isfinite().tolist() == [[False, True, True, True, True, False]]
    by_p = process_logits(logits, [1.0], [0], [0.6], [0.0])
    assert by_p.isfinite().tolist() == [[False, True, True, True, True, False]]


def test_the_likeliest_token_survives_every_filter():
    logits = torch.tensor([[0.0, 5.0, -1.0]])
    scores = process_logits(logits, [0.01], [1], [1e-9], [1.0])
    assert scores.isfinite().tolist() == [[False, True, False]]


def test_a_wrong_number_of_settings_is_refused():
    with pytest.raises(ValueError, match="2 rows"):
        process_logits(torch.zeros(2, 4), [1.0], [0, 0], [1.0, 1.0], [0.0, 0.0])


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999, 1 - 1e-12])
def test_the_nucleus_of_a_large_vocabulary_is_that_of_a_sort(spread, top_p):
    generator = torch.Generator().manual_seed(8)
    logits = torch.randn(3, 5000, generator=generator, dtype=torch.float64) * spread
    logits[1, 100:4000] = -torch.inf
    kept = process_logits(logits, [1.0] * 3, [0] * 3, [top_p] * 3, [0.0] * 3).isfinite()
    sorted_probs, order = logits.softmax(dim=1).sort(dim=1, descending=True)
    num_kept = ((sorted_probs.cumsum(dim=1) - sorted_probs) < top_p).sum(dim=1)
    for row in range(3):
        expected = set(order[row, : num_kept[row]].tolist())
        got = set(kept[row].nonzero().squeeze(1).tolist())
        # The order of a sum may move the boundary by a token of no weight.
        assert sum(float(logits[row].softmax(0)[token]) for token in got ^ expected) < 1e-12
