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

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_MOSTLY_ENOUGH = 256
"""Likeliest tokens that are looked at before a whole row is sorted."""


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
    # Sorting the whole vocabulary costs more than all else here, and the set is mostly small.
    best_RC = filtered_RV.topk(min(_MOSTLY_ENOUGH, filtered_RV.shape[1]), dim=1).values
    threshold_R1, is_reached_R = _last_kept(best_RC, total_R1, limit_R1)
    if not is_reached_R.all():
        wide = (~is_reached_R).nonzero().squeeze(1)
        sorted_WV = filtered_RV[wide].sort(dim=1, descending=True).values
        threshold_R1[wide], _ = _last_kept(sorted_WV, total_R1[wide], limit_R1[wide])
    return _drop_below(scores_RV, rows, threshold_R1)


def _last_kept(sorted_RC: Tensor, total_R1: Tensor, limit_R1: Tensor) -> tuple[Tensor, Tensor]:
    """The score of the last token of each row's set, and whether the set ends in these columns."""
    probs_RC = (sorted_RC - total_R1).exp()
    reached_RC = probs_RC.cumsum(dim=1)
    num_kept_R1 = (reached_RC - probs_RC < limit_R1).sum(dim=1, keepdim=True).clamp(min=1)
    return sorted_RC.gather(1, num_kept_R1 - 1), reached_RC[:, -1] >= limit_R1.squeeze(1)


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
