"""Hands hidden states out with the tokens they belong to, each row once and in text order.

They go to requests that ask for them, and to the head that drafts beside the model. A forward
computes rows of draft nodes that are then rejected, rows that were delivered before a
preemption, and rows of sequences that want none. What is left is copied off the step's tensors when
the step's outcome is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from deployments.engine.torch_engine.head_drafter import FinalRows
from deployments.engine.types import HiddenStates

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from torch import Tensor

    from deployments.engine.torch_engine.core import Runner
    from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
    from deployments.engine.torch_engine.head_drafter import HeadDrafter
    from deployments.engine.torch_engine.scheduler import Chunk
    from deployments.engine.types import GenerationRequest


class Capture:
    """What one sequence wants, and what of it is not delivered yet.

    Attributes:
        next_row: the first row of the text that has not been kept. Rows from here on must be
            computed, even where their pages are cached.
    """

    def __init__(self, layers: tuple[int, ...], next_row: int) -> None:
        self.layers = layers
        self.next_row = next_row
        self._pending: list[HiddenStates] = []

    @classmethod
    def of(cls, request: GenerationRequest) -> Capture | None:
        """What a request asks for."""
        spec = request.capture
        if spec is None:
            return None
        num_tokens = len(request.prompt_token_ids) + len(request.resumed_output_ids)
        return cls(spec.layers, 0 if spec.includes_prompt else num_tokens - 1)

    def keep(
        self, features: dict[int, Tensor], first_row: int, batch_rows: SequenceOf[int]
    ) -> None:
        """Copy final rows.

        Args:
            features: per layer [N, E], of the whole step.
            first_row: where the first of ``batch_rows`` stands in the text.
            batch_rows: rows of the step, in text order.
        """
        batch_rows = batch_rows[max(0, self.next_row - first_row) :]
        if not batch_rows:
            return
        kept = torch.stack(
            [features[layer][list(batch_rows)].to("cpu", torch.float32) for layer in self.layers]
        )
        self._pending.append(HiddenStates(first_row=self.next_row, values=kept.numpy()))
        self.next_row += len(batch_rows)

    def take(self) -> HiddenStates | None:
        """What has been kept since the last call."""
        pending, self._pending = self._pending, []
        return joined(pending)


def joined(parts: SequenceOf[HiddenStates]) -> HiddenStates | None:
    """Consecutive rows as one; None for no parts."""
    if len(parts) < 2:
        return parts[0] if parts else None
    values = np.concatenate([part.values for part in parts], axis=1)
    return HiddenStates(first_row=parts[0].first_row, values=values)


class StepFeatures:
    """The hidden states of one step.

    Args:
        features: per layer [N, E].
        spans: of the step's chunks, in order.
        head: reads what belongs to speculated sequences.
    """

    def __init__(
        self,
        features: dict[int, Tensor],
        spans: SequenceOf[SequenceSpan],
        head: HeadDrafter | None,
    ) -> None:
        self._features = features
        self._spans = spans
        self._head = head
        self._unread: list[FinalRows] = []

    def keep(
        self,
        index: int,
        chunk: Chunk,
        nodes: SequenceOf[int] = (),
        new_token_ids: SequenceOf[int] = (),
    ) -> None:
        """Keep a chunk's final rows if they are wanted. Its text must not have grown yet.

        Args:
            index: of the chunk in the step.
            chunk: its committed rows come first.
            nodes: accepted draft nodes, whose rows follow.
            new_token_ids: that a sampled chunk's text gains; the row behind its end is not wanted.
        """
        sequence = chunk.sequence
        is_read = self._head is not None and sequence.is_session_open
        if sequence.capture is None and not is_read:
            return
        num_committed = chunk.num_new_tokens
        rows = [*range(num_committed), *(num_committed + node for node in nodes)]
        if chunk.is_sampled:
            rows = rows[: num_committed - 1 + len(new_token_ids)]
        first_row, start = sequence.num_computed_tokens, self._spans[index].start
        batch_rows = [start + row for row in rows]
        if sequence.capture is not None:
            sequence.capture.keep(self._features, first_row, batch_rows)
        behind = sequence.token_ids[first_row + 1 : first_row + num_committed + 1]
        next_token_ids = [*behind, *new_token_ids]
        if is_read and batch_rows and next_token_ids:
            batch_rows = batch_rows[: len(next_token_ids)]
            self._unread.append(FinalRows(sequence, first_row, batch_rows, next_token_ids))

    def read(self) -> None:
        """Have the head read what was kept for it."""
        if self._head is not None and self._unread:
            self._head.read(self._features, self._unread)


def forward(
    runner: Runner, chunks: SequenceOf[Chunk], batch: ForwardBatch, head: HeadDrafter | None = None
) -> tuple[Tensor, StepFeatures]:
    """Run a step, and hold on to the hidden states of the layers that somebody in it wants."""
    if head is not None and head.is_off:
        head = None
    captures = (chunk.sequence.capture for chunk in chunks)
    wanted = {layer for c in captures if c is not None for layer in c.layers}
    if head is not None and any(chunk.sequence.is_session_open for chunk in chunks):
        wanted.update(head.capture_layers)
    if not wanted:
        return runner.forward(batch), StepFeatures({}, batch.spans, None)
    layers = tuple(wanted)
    logits_MV, features = runner.forward_with_features(batch, layers)
    by_layer = dict(zip(layers, features, strict=True))
    return logits_MV, StepFeatures(by_layer, batch.spans, head)
