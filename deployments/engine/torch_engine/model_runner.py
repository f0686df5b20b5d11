"""Runs a model's forwards: the only place where batches meet weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kernels.narrow_forward import narrow_forward

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.torch_engine.kv_cache import KVCache
    from deployments.engine.torch_engine.model_config import ModelConfig
    from deployments.engine.torch_engine.models.llama import ForwardOutput, Model


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

    def __init__(self, model: Model, config: ModelConfig, kv_cache: KVCache) -> None:
        """Join a filled model and a pool of its shape.

        Raises:
            ValueError: the pool has another shape or dtype than the model's rows.
        """
        rows = (kv_cache.k.shape[0], *kv_cache.k.shape[2:])
        if rows != (config.num_layers, config.num_kv_heads, config.head_dim):
            raise ValueError(f"the pool keeps rows of {rows}, which are not this model's")
        if kv_cache.k.dtype != model.dtype:
            raise ValueError(f"the pool keeps {kv_cache.k.dtype}, the model writes {model.dtype}")
        self.model = model
        self.config = config
        self.kv_cache = kv_cache
        self._narrow = narrow_forward(model, kv_cache)

    def warm_up(self) -> None:
        """Do before the first request what its first forwards would wait for: compile.

        Writes to slot 0, so no page may be in use yet.
        """
        zero = torch.zeros(1, dtype=torch.int64)
        span = SequenceSpan(start=0, length=1, kv_slots=zero)
        self.forward(
            ForwardBatch(token_ids=zero, positions=zero, slots=zero, spans=(span,), logit_rows=zero)
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Write the batch's KV rows and score what follows its ``logit_rows``: [M, V] float32."""
        if self._narrow is not None and batch.token_ids.shape[0] <= self._narrow.max_tokens:
            return self._narrow.forward(batch)
        return self.forward_with_features(batch, ()).logits

    @torch.inference_mode()
    def forward_with_features(
        self, batch: ForwardBatch, capture_layers: tuple[int, ...]
    ) -> FeatureOutput:
        """As ``forward``, and hand out hidden states.

        Args:
            batch: the forward.
            capture_layers: ``i`` taps the residual stream that enters layer i; ``num_layers`` the
                stream behind the last layer, before the final norm.
        """
        output: ForwardOutput = self.model(batch, self.kv_cache, capture_layers)
        return FeatureOutput(output.logits.float(), output.features)
