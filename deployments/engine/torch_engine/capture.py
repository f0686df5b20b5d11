"""Hands hidden states out with the tokens they belong to, each row once and in text order.

A forward computes rows of draft nodes that are then rejected, rows that were delivered before a
preemption, and rows of sequences that want none. What is left is copied off the step's tensors when
the step's outcome is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from deployments.engine.types import HiddenStates

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as SequenceOf

    from torch import Tensor

    from deployments.engine.torch_engine.core import Runner
    from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
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
    """

    def __init__(self, features: dict[int, Tensor], spans: SequenceOf[SequenceSpan]) -> None:
        self._features = features
        self._spans = spans

    def keep(
        self, index: int, chunk: Chunk, nodes: SequenceOf[int] = (), num_new_tokens: int = 1
    ) -> None:
        """Keep a chunk's final rows if they are wanted. Its text must not have grown yet.

        Args:
            index: of the chunk in the step.
            chunk: its committed rows come first.
            nodes: accepted draft nodes, whose rows follow.
            num_new_tokens: tokens that the text gains; the row behind its end is not wanted.
        """
        sequence = chunk.sequence
        if sequence.capture is None:
            return
        num_committed = chunk.num_new_tokens
        rows = [*range(num_committed), *(num_committed + node for node in nodes)]
        rows = rows[: num_committed - 1 + num_new_tokens]
        start = self._spans[index].start
        sequence.capture.keep(
            self._features, sequence.num_computed_tokens, [start + row for row in rows]
        )


def forward(
    runner: Runner, chunks: Iterable[Chunk], batch: ForwardBatch
) -> tuple[Tensor, StepFeatures]:
    """Run a step, and hold on to the hidden states of the layers that somebody in it wants."""
    captures = (chunk.sequence.capture for chunk in chunks)
    layers = tuple({layer for c in captures if c is not None for layer in c.layers})
    if not layers:
        return runner.forward(batch), StepFeatures({}, batch.spans)
    logits_MV, features = runner.forward_with_features(batch, layers)
    return logits_MV, StepFeatures(dict(zip(layers, features, strict=True)), batch.spans)
