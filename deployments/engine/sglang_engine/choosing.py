"""Chooses tokens as the embedded engine does: one definition of sampling for both engines.

M: rows, R: those of them that are sampled, V: vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from deployments.engine.sglang_engine.own_params import SamplingRow
from deployments.engine.speculation.noise import gumbel, row_keys_at
from deployments.engine.torch_engine.drawing import draw
from deployments.engine.torch_engine.kernels.compiling import first_call
from deployments.engine.torch_engine.sampling_math import process_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_ROWS_AT_ONCE = 16
"""Bounds the float64 temporaries."""
_WARM_UP_ROW = SamplingRow(choice_key=1, temperature=1.0, top_k=8, top_p=0.5, min_p=0.0)
_UNSIGNED = (1 << 64) - 1


def choose(logits_MV: Tensor, rows: Sequence[SamplingRow], positions_M: Tensor) -> Tensor:
    """One token per row.

    On a GPU the host does not wait for the tokens.

    Args:
        logits_MV: penalties, biases and grammar already applied; left unchanged.
        rows: M, in the order of the logits.
        positions_M: [M] int64, of the tokens to choose, counted from the first prompt token.

    Returns:
        [M] int64.
    """
    tokens_M = logits_MV.argmax(dim=1)
    sampled = [index for index, row in enumerate(rows) if row.temperature > 0]
    for start in range(0, len(sampled), _ROWS_AT_ONCE):
        part = sampled[start : start + _ROWS_AT_ONCE]
        index_R = torch.tensor(part, device=logits_MV.device)
        tokens_M[index_R] = _draw(
            logits_MV[index_R], [rows[index] for index in part], positions_M[index_R]
        )
    return tokens_M


def warm_up() -> None:
    """Compile what a CPU needs, before anybody waits for it."""
    with first_call():
        choose(torch.randn(1, 128), [_WARM_UP_ROW], torch.zeros(1, dtype=torch.int64))


def _draw(logits_RV: Tensor, rows: Sequence[SamplingRow], positions_R: Tensor) -> Tensor:
    scores_RV = process_logits(
        logits_RV.to(torch.float64),
        [row.temperature for row in rows],
        [row.top_k for row in rows],
        [row.top_p for row in rows],
        [row.min_p for row in rows],
    )
    keys_R = row_keys_at([row.choice_key for row in rows], positions_R)
    if scores_RV.device.type == "cpu":
        return torch.tensor(draw(scores_RV, [key & _UNSIGNED for key in keys_R.tolist()]))
    vocabulary = torch.arange(scores_RV.shape[1], device=scores_RV.device)
    return (scores_RV + gumbel(keys_R, vocabulary)).argmax(dim=1)
