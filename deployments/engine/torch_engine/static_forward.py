"""A forward of fixed shape: what a GPU can record once and replay.

A batch is padded to a bucket of B spans with Q new rows and L visible rows each, and copied into
buffers that never move. What runs then is the model's own code on these buffers, so it computes
what the forward of exact shapes does, up to rounding. Everything here also runs on a CPU, where it
is tested.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.torch_engine.attention import SpanGroup, visible_rows

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from deployments.engine.torch_engine.forward_batch import ForwardBatch
    from deployments.engine.torch_engine.kv_cache import KVCache
    from deployments.engine.torch_engine.models.llama import ForwardOutput, Model

_SHORTEST_CONTEXT = 256
_CONTEXT_STEP = 4
_MAX_GATHERED_ROWS = 1 << 17
"""Rows that attention gathers per layer; with larger steps, launching kernels is no bottleneck."""


class Bucket(NamedTuple):
    """The shape of a padded batch.

    Attributes:
        num_spans: B.
        length: Q, new rows of a span.
        context: L, rows a span sees, new ones included.
    """

    num_spans: int
    length: int
    context: int

    def holds(self, batch: ForwardBatch) -> bool:
        """Whether the batch fits."""
        return len(batch.spans) <= self.num_spans and all(
            span.length <= self.length and span.kv_slots.shape[0] <= self.context
            for span in batch.spans
        )


def buckets(max_num_spans: int, lengths: Iterable[int], max_context: int) -> list[Bucket]:
    """The shapes to prepare for, cheapest first.

    Args:
        max_num_spans: sequences of one step, at most; every power of two up to it is a size.
        lengths: new rows of a sequence in the steps that count: 1 to decode, 1 + k to verify.
        max_context: of one sequence; contexts grow by fours up to it.
    """
    sizes = [1]
    while sizes[-1] < max_num_spans:
        sizes.append(min(sizes[-1] * 2, max_num_spans))
    contexts = [min(_SHORTEST_CONTEXT, max_context)]
    while contexts[-1] < max_context:
        contexts.append(min(contexts[-1] * _CONTEXT_STEP, max_context))
    shapes = [Bucket(*shape) for shape in product(sizes, sorted(set(lengths)), contexts)]
    shapes = [shape for shape in shapes if shape.num_spans * shape.context <= _MAX_GATHERED_ROWS]
    return sorted(shapes, key=lambda shape: shape.num_spans * shape.length * shape.context)


class StaticForward:
    """The buffers of one bucket, and the model's forward on them.

    Padding rows see and write the pool's last row, which no sequence may own.
    """

    def __init__(
        self,
        model: Model,
        kv_cache: KVCache,
        bucket: Bucket,
        capture_layers: tuple[int, ...] = (),
    ) -> None:
        num_rows = bucket.num_spans * bucket.length
        device = model.device
        self.bucket = bucket
        self._capture_layers = capture_layers
        self._model = model
        self._kv_cache = kv_cache
        self._spare_slot = kv_cache.num_slots - 1

        def integers(count: int) -> Tensor:
            return torch.zeros(count, dtype=torch.int64, device=device)

        self._token_ids = integers(num_rows)
        self._positions = integers(num_rows)
        self._slots = integers(num_rows)
        self._kv_slots = integers(bucket.num_spans * bucket.context)
        self._rows = torch.arange(num_rows, device=device)
        self._is_visible = torch.zeros(
            (bucket.num_spans, 1, bucket.length, bucket.context), dtype=torch.bool, device=device
        )
        self._is_visible[..., 0] = True
        self._slots.fill_(self._spare_slot)
        self._kv_slots.fill_(self._spare_slot)

    def load(self, batch: ForwardBatch) -> Tensor:
        """Copy a batch that the bucket holds into the buffers.

        Returns:
            [N] int64 on the CPU, the rows of ``compute`` that are the batch's.
        """
        num_spans, length, context = self.bucket
        row_of = torch.empty(batch.token_ids.shape[0], dtype=torch.int64)
        kv_slots = torch.full((num_spans, context), self._spare_slot, dtype=torch.int64)
        is_visible = torch.zeros((num_spans, 1, length, context), dtype=torch.bool)
        # A row that sees nothing would be NaN, and padding must not be.
        is_visible[..., 0] = True
        for index, span in enumerate(batch.spans):
            first = index * length
            end = span.start + span.length
            row_of[span.start : end] = torch.arange(first, first + span.length)
            kv_slots[index, : span.kv_slots.shape[0]] = span.kv_slots
            is_visible[index, 0, : span.length] = visible_rows(span, context)
        for buffer, padding, values in (
            (self._token_ids, 0, batch.token_ids),
            (self._positions, 0, batch.positions),
            (self._slots, self._spare_slot, batch.slots),
        ):
            padded = torch.full((num_spans * length,), padding, dtype=torch.int64)
            padded[row_of] = values
            buffer.copy_(padded)
        self._kv_slots.copy_(kv_slots.flatten())
        self._is_visible.copy_(is_visible)
        return row_of

    def compute(self) -> ForwardOutput:
        """Logits and features of all B * Q rows. Only device work, nothing waits."""
        mask = torch.zeros(
            self._is_visible.shape, dtype=self._model.compute_dtype, device=self._model.device
        )
        mask.masked_fill_(~self._is_visible, -torch.inf)
        group = SpanGroup(
            rows=self._rows,
            slots=self._kv_slots,
            num_spans=self.bucket.num_spans,
            mask=mask,
            is_causal=False,
        )
        return self._model.compute(
            self._token_ids,
            self._positions,
            self._slots,
            (group,),
            self._rows,
            self._kv_cache,
            self._capture_layers,
        )
