"""Records the narrow forwards of a GPU once and replays them.

A decode step of a small model is hundreds of short kernels, and launching them one by one takes
longer than running them. A recorded graph is launched as one.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

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
    logits: Tensor


class CudaGraphs:
    """One recorded graph for each bucket; all share their memory. Belongs to the engine thread."""

    def __init__(self, model: Model, kv_cache: KVCache, shapes: list[Bucket]) -> None:
        """Record every shape.

        Args:
            model: on a CUDA device.
            kv_cache: on the same; its last row is written by padding.
            shapes: cheapest first.
        """
        started = time.monotonic()
        self._recordings: list[_Recording] = []
        self._pool = torch.cuda.graph_pool_handle()
        num_rows = max(shape.num_spans * shape.length for shape in shapes)
        self._logits = torch.empty(
            num_rows, model.config.vocab_size, dtype=model.dtype, device=model.device
        )
        # The largest first: what it allocates is enough for all others.
        for bucket in reversed(shapes):
            self._recordings.insert(0, self._record(StaticForward(model, kv_cache, bucket)))
        elapsed = time.monotonic() - started
        logger.info("recorded %d forwards in %.1f s", len(shapes), elapsed)

    def forward(self, batch: ForwardBatch) -> Tensor | None:
        """As ``ModelRunner.forward``; None if the batch fits none of the shapes."""
        for forward, graph, logits in self._recordings:
            if forward.bucket.holds(batch):
                rows = forward.load(batch)
                graph.replay()
                # A copy: all shapes write their logits to the same memory.
                return logits.index_select(0, rows.to(logits.device)).float()
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
        logits = self._logits[: forward.bucket.num_spans * forward.bucket.length]
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            logits.copy_(forward.compute())
        return _Recording(forward, graph, logits)


def cuda_graphs(
    model: Model, kv_cache: KVCache, *, max_num_seqs: int, num_draft_tokens: int, max_context: int
) -> CudaGraphs | None:
    """Graphs for the steps that only decode and verify; None where there is no GPU."""
    if model.device.type != "cuda":
        return None
    lengths = (1, 1 + num_draft_tokens)
    return CudaGraphs(model, kv_cache, buckets(max_num_seqs, lengths, max_context))
