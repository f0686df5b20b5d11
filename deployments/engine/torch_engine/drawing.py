"""Draws tokens: the argmax of scores plus noise, computed only where it can be.

D: rows, V: vocabulary, C: candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from deployments.engine.speculation.noise import gumbel
from deployments.engine.torch_engine.kernels.noise import smallest_bits, tokens_above

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_LIKELIEST = 64
"""Candidates in any case; the best of them is what all others must beat by their noise alone."""


def draw(scores_DV: Tensor, row_keys: Sequence[int]) -> list[int]:
    """The token of the largest sum of score and noise in each row.

    Args:
        scores_DV: float64, finite or ``-inf``, at least one finite per row.
        row_keys: D keys from ``speculation.noise.row_key``.
    """
    if scores_DV.device.type != "cpu":
        return draw_from_all(scores_DV, row_keys)
    likeliest = scores_DV.topk(min(_LIKELIEST, scores_DV.shape[1]), dim=1)
    noisy_DC = likeliest.values + gumbel(row_keys, likeliest.indices)
    best = noisy_DC.max(dim=1)
    tokens: list[int] = likeliest.indices.gather(1, best.indices.unsqueeze(1)).squeeze(1).tolist()
    # Whoever is not among the likeliest needs at least this much noise.
    needed = (best.values - likeliest.values[:, -1]).tolist()
    for row, (value, noise) in enumerate(zip(best.values.tolist(), needed, strict=True)):
        if noise < torch.inf:
            tokens[row] = _best_outsider(scores_DV[row], row_keys[row], noise, value, tokens[row])
    return tokens


def draw_from_all(scores_DV: Tensor, row_keys: Sequence[int]) -> list[int]:
    """As ``draw``, with the noise of the whole vocabulary."""
    vocabulary = torch.arange(scores_DV.shape[1], device=scores_DV.device)
    tokens: list[int] = (scores_DV + gumbel(row_keys, vocabulary)).argmax(dim=1).tolist()
    return tokens


def _best_outsider(
    scores_V: Tensor, row_key: int, needed_noise: float, best_value: float, best_token: int
) -> int:
    """The winner, if tokens that score too low to be likely are looked at as well."""
    ids = np.empty(scores_V.shape[0], dtype=np.int64)
    count = tokens_above(np.uint64(row_key), np.uint64(smallest_bits(needed_noise)), ids)
    if not count:
        return best_token
    ids_C = torch.from_numpy(ids[:count])
    value, index = (scores_V[ids_C] + gumbel([row_key], ids_C)[0]).max(dim=0)
    return int(ids_C[index]) if float(value) > best_value else best_token
