"""Records the narrow forwards of a GPU once and replays them.

A decode step of a small model is hundreds of short kernels, and launching them one by one takes
longer than running them. A recorded graph is launched as one.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.torch_engine.models.llama import ForwardOutput
from deployments.engine.torch_engine.static_forward import StaticForward, buckets

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.torch_engine.forward_batch import ForwardBatch
    from deployments.engine.torch_engine.kv_cache import KVCache
    from deployments.engine.torch_engine.models.llama import Model
    from deployments.engine.torch_engine.static_forward import Bucket

logger = logging.getLogger(__name__)

_NUM_WARM_UPS = 2
"""Runs before a recording: libraries allocate and choose their kernels in the first ones."""


class _Recording(NamedTuple):
    forward: StaticForward
    graph: torch.cuda.CUDAGraph
    output: ForwardOutput


class CudaGraphs:
    """One recorded graph for each bucket; all share their memory. Belongs to the engine thread."""

    def __init__(
        self,
        model: Model,
        kv_cache: KVCache,
        shapes: list[Bucket],
        capture_layers: tuple[int, ...] = (),
    ) -> None:
        """Record every shape.

        Args:
            model: on a CUDA device.
            kv_cache: on the same; its last row is written by padding.
            shapes: cheapest first.
            capture_layers: whose features are recorded too, as in ``Model.forward``.
        """
        self._capture_layers = capture_layers
        started = time.monotonic()
        self._recordings: list[_Recording] = []
        self._pool = torch.cuda.graph_pool_handle()
        num_rows = max(shape.num_spans * shape.length for shape in shapes)
        self._logits = torch.empty(
            num_rows, model.config.vocab_size, dtype=model.dtype, device=model.device
        )
        self._features = tuple(
            torch.empty(num_rows, model.config.hidden_size, dtype=model.dtype, device=model.device)
            for _ in capture_layers
        )
        # The largest first: what it allocates is enough for all others.
        for bucket in reversed(shapes):
            forward = StaticForward(model, kv_cache, bucket, capture_layers)
            self._recordings.insert(0, self._record(forward))
        elapsed = time.monotonic() - started
        logger.info("recorded %d forwards in %.1f s", len(shapes), elapsed)

    def forward(
        self, batch: ForwardBatch, capture_layers: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """As ``ModelRunner.forward_with_features``.

        Returns:
            None if the batch fits none of the shapes, or other features are wanted than recorded.
        """
        if not set(capture_layers) <= set(self._capture_layers):
            return None
        wanted = [self._capture_layers.index(layer) for layer in capture_layers]
        for forward, graph, output in self._recordings:
            if forward.bucket.holds(batch):
                rows = forward.load(batch)
                graph.replay()
                # Copies: all shapes write to the same memory.
                scored = rows[batch.logit_rows].to(output.logits.device)
                logits = output.logits.index_select(0, scored).float()
                rows = rows.to(logits.device) if wanted else rows
                features = (output.features[index].index_select(0, rows) for index in wanted)
                return logits, tuple(features)
        return None

    @torch.inference_mode()
    def _record(self, forward: StaticForward) -> _Recording:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UPS):
                forward.compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        num_rows = forward.bucket.num_spans * forward.bucket.length
        kept = ForwardOutput(
            self._logits[:num_rows], tuple(feature[:num_rows] for feature in self._features)
        )
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            output = forward.compute()
            kept.logits.copy_(output.logits)
            for own, feature in zip(kept.features, output.features, strict=True):
                own.copy_(feature)
        return _Recording(forward, graph, kept)


def cuda_graphs(
    model: Model,
    kv_cache: KVCache,
    *,
    max_num_seqs: int,
    num_draft_tokens: int,
    max_context: int,
    capture_layers: tuple[int, ...] = (),
) -> CudaGraphs | None:
    """Graphs for the steps that only decode and verify; None where there is no GPU."""
    if model.device.type != "cuda":
        return None
    lengths = (1, 1 + num_draft_tokens)
    shapes = buckets(max_num_seqs, lengths, max_context)
    return CudaGraphs(model, kv_cache, shapes, capture_layers)
