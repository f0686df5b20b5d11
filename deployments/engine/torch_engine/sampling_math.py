"""From raw logits to the scores a token is drawn from: pure functions on [R, V] tensors.

R: rows (one per sampled position), V: vocabulary.

A row's distribution is ``softmax(scores)``; excluded tokens score ``-inf``. Adding standard Gumbel
noise to the scores and taking the argmax draws from it. Every rule is a threshold on the score, so
equal scores are kept or dropped together and the result does not depend on the order of a sort.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from deployments.engine.torch_engine.kernels.nucleus import last_kept

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def process_logits(
    logits_RV: Tensor,
    temperature: Sequence[float],
    top_k: Sequence[int],
    top_p: Sequence[float],
    min_p: Sequence[float],
) -> Tensor:
    """Apply temperature, then top-k, top-p and min-p, each row with its own settings.

    The order is that of vLLM and transformers. A row of temperature 0 is returned as it came: its
    token is the plain argmax, which no filter can change.

    Args:
        logits_RV: float32 or float64, penalties and biases already applied; left unchanged.
        temperature: R values; 0 is greedy.
        top_k: R values; 0 is off.
        top_p: R values in (0, 1]; 1 is off.
        min_p: R values in [0, 1]; 0 is off.

    Returns:
        [R, V] scores of the same dtype; at least one token of each row is finite.

    Raises:
        ValueError: a list's length is not R.
    """
    num_rows = logits_RV.shape[0]
    if any(len(values) != num_rows for values in (temperature, top_k, top_p, min_p)):
        raise ValueError(f"each setting needs one value for each of the {num_rows} rows")
    sampled = [row for row in range(num_rows) if temperature[row] > 0]
    if not sampled:
        return logits_RV
    temperature_S1 = _column([temperature[row] for row in sampled], logits_RV)
    scores_SV = logits_RV[sampled] / temperature_S1
    scores_SV = _keep_top_k(scores_SV, [top_k[row] for row in sampled])
    scores_SV = _keep_top_p(scores_SV, [top_p[row] for row in sampled])
    scores_SV = _keep_min_p(scores_SV, [min_p[row] for row in sampled])
    if len(sampled) == num_rows:
        return scores_SV
    scores_RV = logits_RV.clone()
    scores_RV[sampled] = scores_SV
    return scores_RV


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _keep_top_k(scores_RV: Tensor, top_k: Sequence[int]) -> Tensor:
    """Drop what scores below the row's k-th best."""
    vocab_size = scores_RV.shape[1]
    rows = [row for row, k in enumerate(top_k) if 0 < k < vocab_size]
    if not rows:
        return scores_RV
    best_RK = scores_RV[rows].topk(max(top_k[row] for row in rows), dim=1).values
    kth_R1 = best_RK.gather(
        1, torch.tensor([[top_k[row] - 1] for row in rows], device=scores_RV.device)
    )
    return _drop_below(scores_RV, rows, kth_R1)


def _keep_top_p(scores_RV: Tensor, top_p: Sequence[float]) -> Tensor:
    """Keep the smallest set of likeliest tokens whose probabilities reach ``top_p``."""
    rows = [row for row, p in enumerate(top_p) if p < 1]
    if not rows:
        return scores_RV
    # float64: a float32 running sum over a large vocabulary shifts the boundary by whole tokens.
    filtered_RV = scores_RV[rows].to(torch.float64)
    total_R1 = filtered_RV.logsumexp(dim=1, keepdim=True)
    limit_R1 = _column([top_p[row] for row in rows], filtered_RV)
    probs_RV = (filtered_RV - total_R1).exp()
    if filtered_RV.device.type == "cpu":
        threshold_R1 = torch.empty_like(limit_R1)
        last_kept(
            filtered_RV.numpy(),
            probs_RV.numpy(),
            limit_R1.numpy()[:, 0],
            threshold_R1.numpy()[:, 0],
        )
    else:
        sorted_RV, order_RV = filtered_RV.sort(dim=1, descending=True)
        probs_RV = probs_RV.gather(1, order_RV)
        before_RV = probs_RV.cumsum(dim=1) - probs_RV
        num_kept_R1 = (before_RV < limit_R1).sum(dim=1, keepdim=True).clamp(min=1)
        threshold_R1 = sorted_RV.gather(1, num_kept_R1 - 1)
    return _drop_below(scores_RV, rows, threshold_R1)


def _keep_min_p(scores_RV: Tensor, min_p: Sequence[float]) -> Tensor:
    """Drop tokens less likely than ``min_p`` times the likeliest one."""
    rows = [row for row, p in enumerate(min_p) if p > 0]
    if not rows:
        return scores_RV
    log_min_p_R1 = _column([math.log(min_p[row]) for row in rows], scores_RV)
    best_R1 = scores_RV[rows].max(dim=1, keepdim=True).values
    return _drop_below(scores_RV, rows, best_R1 + log_min_p_R1)


def _drop_below(scores_RV: Tensor, rows: list[int], threshold_R1: Tensor) -> Tensor:
    """``-inf`` where one of ``rows`` scores below its threshold; other rows as they are."""
    kept = scores_RV[rows]
    kept = kept.masked_fill(kept < threshold_R1, -torch.inf)
    if len(rows) == scores_RV.shape[0]:
        return kept
    scores_RV = scores_RV.clone()
    scores_RV[rows] = kept
    return scores_RV
