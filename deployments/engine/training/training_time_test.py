"""Training-time test: a head is trained on the features it will see, its own.

The first step reads the target's features. Every further one reads the output of the step before,
and at position t attends to what drafting there would have: the rows of committed text up to t, and
the head's own rows of the steps in between.

Source: EAGLE-3 (arXiv:2503.01840), section 3.2; SpecForge.

B: sequences, T: positions, E: hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from deployments.engine.training.batches import FeatureBatch
    from deployments.engine.training.eagle3 import Eagle3Head, Rows


class UnrolledStep(NamedTuple):
    """What one step drafted from, and what it should have drafted.

    Attributes:
        hidden: [B, T, E], before the head's final norm.
        teacher: [B, T, E], what the target's head read for the same token.
        wanted: [B, T] int64, the token the target would choose.
        is_counted: [B, T] bool: the answer's positions whose wanted token can be drafted.
        is_answer: [B, T] bool: all of the answer's positions.
    """

    hidden: Tensor
    teacher: Tensor
    wanted: Tensor
    is_counted: Tensor
    is_answer: Tensor


def unroll(
    head: Eagle3Head, embedding_VE: Tensor, batch: FeatureBatch, num_steps: int
) -> Iterator[UnrolledStep]:
    """Draft ``num_steps`` tokens behind every position, fed with the true tokens.

    Args:
        head: in training or not.
        embedding_VE: the target's.
        batch: texts and features.
        num_steps: at least 1.
    """
    num_positions = batch.token_ids.shape[1]
    device = batch.token_ids.device
    rows = torch.arange(num_positions, device=device)
    causal = rows[:, None] >= rows[None, :]
    feature = head.fuse(batch.features)
    steps: tuple[Rows, ...] = ()
    for step in range(num_steps):
        shift = step + 1
        embedded = F.embedding(_left(batch.token_ids, shift), embedding_VE)
        positions = (rows + step).expand(batch.token_ids.shape[0], -1)
        output = head(embedded.to(feature.dtype), feature, positions, steps, causal)
        steps = (*steps, output.rows)
        feature = output.hidden
        wanted = _left(batch.wanted, shift)
        is_answer = _left(batch.is_answer, shift)
        yield UnrolledStep(
            hidden=output.hidden,
            teacher=_left(batch.hidden, shift),
            wanted=wanted,
            is_counted=is_answer & head.get_buffer("t2d")[wanted],
            is_answer=is_answer,
        )


def _left(x: Tensor, shift: int) -> Tensor:
    """Position t gets what stood at t + shift; the end is filled with zeros."""
    kept = x[:, shift:]
    filling = x.new_zeros((x.shape[0], x.shape[1] - kept.shape[1], *x.shape[2:]))
    return torch.cat((kept, filling), dim=1)
