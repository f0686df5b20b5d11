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


def draw(
    logits_DV: Tensor, row_keys: Sequence[int], temperatures: Sequence[float] | None = None
) -> list[int]:
    """The token of the largest sum of score and noise in each row.

    Args:
        logits_DV: float32 or float64, finite or ``-inf``, at least one finite per row.
        row_keys: D keys from ``speculation.noise.row_key``.
        temperatures: scores are logits over these, in float64; without them logits are scores.
    """
    column = [1.0] * len(row_keys) if temperatures is None else temperatures
    temperature_D1 = torch.tensor(column, dtype=torch.float64, device=logits_DV.device).unsqueeze(1)
    if logits_DV.device.type != "cpu":
        return draw_from_all(logits_DV.to(torch.float64) / temperature_D1, row_keys)
    best_D, likeliest_D = logits_DV.max(dim=1)
    noise = gumbel(row_keys, likeliest_D.unsqueeze(1))[:, 0].tolist()
    rows = logits_DV.numpy()
    ids = np.empty(rows.shape, dtype=np.int64)
    # Also where a temperature is so low that distances are no numbers.
    ids[:, 0] = likeliest_D.numpy()
    counts = [
        # Whoever wins has more noise than the likeliest token, by what lies between their scores.
        tokens_above(
            np.uint64(row_keys[row]), smallest_bits(noise[row]), rows[row], best, inverse, ids[row]
        )
        for row, (best, inverse) in enumerate(
            zip(best_D.tolist(), (1.0 / temperature_D1)[:, 0].tolist(), strict=True)
        )
    ]
    ids_DC = torch.from_numpy(ids)[:, : max(1, *counts)]
    for row, count in enumerate(counts):
        ids_DC[row, count:] = ids_DC[row, 0]
    scores_DC = logits_DV.gather(1, ids_DC).to(torch.float64) / temperature_D1
    winner_D1 = (scores_DC + gumbel(row_keys, ids_DC)).argmax(dim=1, keepdim=True)
    tokens: list[int] = ids_DC.gather(1, winner_D1)[:, 0].tolist()
    return tokens


def draw_from_all(scores_DV: Tensor, row_keys: Sequence[int]) -> list[int]:
    """As ``draw``, with the noise of the whole vocabulary."""
    vocabulary = torch.arange(scores_DV.shape[1], device=scores_DV.device)
    tokens: list[int] = (scores_DV + gumbel(row_keys, vocabulary)).argmax(dim=1).tolist()
    return tokens
