"""Training-time test: a draft is trained on what it will see, its own.

How a draft goes on from its own output is its own affair (``DraftModule.unrolled``); here its steps
are put beside what the target would have said.

Source: EAGLE-3 (arXiv:2503.01840), section 3.2; SpecForge.

B: sequences, T: positions, E: hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.training.batches import left

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from deployments.engine.training.batches import FeatureBatch
    from deployments.engine.training.draft_module import DraftModule


class UnrolledStep(NamedTuple):
    """What one step drafted from, and what it should have drafted.

    Attributes:
        hidden: [B, T, E], before the draft's final norm.
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
    draft: DraftModule, embedding_VE: Tensor, batch: FeatureBatch, num_steps: int
) -> Iterator[UnrolledStep]:
    """Draft ``num_steps`` tokens behind every position, fed with the true tokens.

    Args:
        draft: in training or not.
        embedding_VE: the target's.
        batch: texts and features.
        num_steps: at least 1.
    """
    can_draft = draft.get_buffer("t2d")
    for step, hidden in enumerate(draft.unrolled(embedding_VE, batch, num_steps)):
        shift = step + 1
        wanted = left(batch.wanted, shift)
        is_answer = left(batch.is_answer, shift)
        yield UnrolledStep(
            hidden=hidden,
            teacher=left(batch.hidden, shift),
            wanted=wanted,
            is_counted=is_answer & can_draft[wanted],
            is_answer=is_answer,
        )
