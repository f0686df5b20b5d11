"""Takes what structures forbid out of a step's scores, all rows at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from deployments.engine.torch_engine.structure.constraint import Constraint


def forbid(scores_RV: Tensor, places: Sequence[tuple[Constraint | None, Sequence[int]]]) -> None:
    """Set the scores of forbidden tokens to ``-inf``.

    Args:
        scores_RV: changed in place.
        places: each row's structure, or None, and the draft tokens that lead to the row.
    """
    vocab_size = scores_RV.shape[1]
    rows = [row for row, (structure, _) in enumerate(places) if structure is not None]
    if not rows:
        return
    bits_SW = np.empty((len(rows), -(-vocab_size // 32)), dtype=np.uint32)
    for bits_W, row in zip(bits_SW, rows, strict=True):
        structure, path = places[row]
        if structure is not None:
            structure.fill(path, bits_W)
    is_allowed_SV = np.unpackbits(
        bits_SW.view(np.uint8), axis=1, count=vocab_size, bitorder="little"
    )
    is_forbidden_SV = torch.from_numpy(is_allowed_SV == 0).to(scores_RV.device)
    if len(rows) == len(places):
        scores_RV.masked_fill_(is_forbidden_SV, -torch.inf)
    else:
        scores_RV[rows] = scores_RV[rows].masked_fill(is_forbidden_SV, -torch.inf)
