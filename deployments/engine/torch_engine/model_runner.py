"""Runs a model's forwards: the only place where batches meet weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.compile_ahead import compile_ahead, first_batch
from deployments.engine.torch_engine.kernels.compiling import first_call, machine
from deployments.engine.torch_engine.kernels.narrow_forward import (
    TILE_TOKENS,
    NarrowForward,
    max_narrow_tokens,
    obstacle,
)

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.torch_engine.cuda_graphs import CudaGraphs
    from deployments.engine.torch_engine.forward_batch import ForwardBatch
    from deployments.engine.torch_engine.kv_cache import KVCache
    from deployments.engine.torch_engine.model_config import ModelConfig
    from deployments.engine.torch_engine.models.llama import ForwardOutput, Model, Weight


class FeatureOutput(NamedTuple):
    """Logits and tapped features of one forward.

    Attributes:
        logits: [M, V] float32.
        features: per captured layer [N, E] in the model's dtype, every row of the batch.
    """

    logits: Tensor
    features: tuple[Tensor, ...]


class ModelRunner:
    """A model with the KV pool it writes to. Not thread-safe: it belongs to the engine thread."""

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        kv_cache: KVCache,
        *,
        is_deterministic: bool = False,
        graphs: CudaGraphs | None = None,
    ) -> None:
        """Join a filled model and a pool of its shape.

        Args:
            model: filled.
            config: its own.
            kv_cache: where it writes, on the model's device.
            is_deterministic: compute every width with the arithmetic whose bits depend on nothing
                but a row's own text.
            graphs: recorded forwards of this model and pool, on a GPU.

        Raises:
            ValueError: the pool has another shape or dtype than the model's rows.
            UnsupportedModelError: this model has no deterministic arithmetic here.
        """
        rows = (kv_cache.k.shape[0], *kv_cache.k.shape[2:])
        if rows != (config.num_layers, config.num_kv_heads, config.head_dim):
            raise ValueError(f"the pool keeps rows of {rows}, which are not this model's")
        if kv_cache.k.dtype != model.dtype:
            raise ValueError(f"the pool keeps {kv_cache.k.dtype}, the model writes {model.dtype}")
        self.model = model
        self.config = config
        self.kv_cache = kv_cache
        self._graphs = graphs
        self._is_deterministic = is_deterministic
        self._narrow: NarrowForward | None = None
        self._is_compiled = False
        reason = obstacle(model, kv_cache)
        if reason is None:
            max_tokens = None if is_deterministic else max_narrow_tokens(model)
            self._is_compiled = max_tokens is None
            self._narrow = NarrowForward(
                model, kv_cache, max_tokens or TILE_TOKENS, torch.get_num_threads()
            )
        elif is_deterministic:
            raise UnsupportedModelError(f"engine.deterministic: {reason}")

    @property
    def is_compiled(self) -> bool:
        """Whether compiled code computes every width, so that packed weights are all it reads."""
        return self._is_compiled

    @property
    def arithmetic(self) -> str:
        """Who computes the KV rows, as ``PageLayout.engine`` wants it.

        Only where their bits matter: up to rounding all replicas compute the same rows and share
        pages, whatever their processors.
        """
        if not self._is_deterministic:
            return "torch"
        form = "dense" if cast("Weight", self.model.lm_head).packed is None else "packed"
        return f"compiled {form} {machine()}"

    def warm_up(self) -> None:
        """Do before the first request what its first forwards would wait for: compile.

        Writes to slot 0, so no page may be in use yet.
        """
        if self._narrow is not None:
            compile_ahead(self.kv_cache.k.dtype)
        with first_call():
            self.forward(first_batch())

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Write the batch's KV rows and score what follows its ``logit_rows``: [M, V] float32."""
        return self.forward_with_features(batch, ()).logits

    @torch.inference_mode()
    def forward_with_features(
        self, batch: ForwardBatch, capture_layers: tuple[int, ...]
    ) -> FeatureOutput:
        """As ``forward``, and hand out hidden states.

        Args:
            batch: the forward.
            capture_layers: as in ``Model.forward``; empty for none.
        """
        narrow = self._narrow
        if narrow is not None and (
            self._is_compiled or batch.token_ids.shape[0] <= narrow.max_tokens
        ):
            return FeatureOutput(*narrow.forward_with_features(batch, capture_layers))
        if self._graphs is not None:
            replayed = self._graphs.forward(batch, capture_layers)
            if replayed is not None:
                return FeatureOutput(*replayed)
        output: ForwardOutput = self.model(batch, self.kv_cache, capture_layers)
        return FeatureOutput(output.logits.float(), output.features)
