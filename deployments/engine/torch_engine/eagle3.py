"""An EAGLE-3 head as the engine computes it: one decoder layer beside its target.

At position t it sees the embedding of token t + 1 and a feature: for committed text the target's
own, fused by ``fc``; behind it the head's own output. It scores what comes at t + 2, among the
tokens of its draft vocabulary only (FR-Spec, arXiv:2502.14856). Keys and values of committed text
depend on nothing but token and feature, so they are written without running the layer.

Source: EAGLE-3 (arXiv:2503.01840). ``training.eagle3`` is the same head as it is trained.

N: rows, E: hidden size of the target, d: draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.attention import group_spans
from deployments.engine.torch_engine.model_config import ModelConfig
from deployments.engine.torch_engine.models.llama import (
    MLP,
    Attention,
    LayerContext,
    RMSNorm,
    Weight,
)
from deployments.engine.torch_engine.rotary import inverse_frequencies, rotate, rotation_table

if TYPE_CHECKING:
    from deployments.engine.torch_engine.forward_batch import ForwardBatch
    from deployments.engine.torch_engine.kv_cache import KVCache
    from deployments.engine.torch_engine.rotary import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Config:
    """The shape of a head.

    Attributes:
        aux_layers: the target's layers (counted from 0) whose outputs are fused.
        max_positions: of the target.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    vocab_size: int
    draft_vocab_size: int
    aux_layers: tuple[int, int, int]
    max_positions: int

    @classmethod
    def for_target(cls, target: ModelConfig, draft_vocab_size: int) -> Eagle3Config:
        """The head that SpecForge would build for a target: its own widths, three features.

        Raises:
            ValueError: the target has fewer than six layers, or a smaller vocabulary.
            UnsupportedModelError: its positions are scaled as no head's are (yarn).
        """
        if target.rope.scaling == "yarn":
            raise UnsupportedModelError("draft heads for targets with yarn positions")
        if target.num_layers < 6:
            raise ValueError(f"a model of {target.num_layers} layers is no larger than its draft")
        if not 0 < draft_vocab_size <= target.vocab_size:
            raise ValueError(f"the target has {target.vocab_size} tokens, not {draft_vocab_size}")
        return cls(
            hidden_size=target.hidden_size,
            num_heads=target.num_heads,
            num_kv_heads=target.num_kv_heads,
            head_dim=target.head_dim,
            intermediate_size=target.intermediate_size,
            rms_norm_eps=target.rms_norm_eps,
            rope=target.rope,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            aux_layers=(1, target.num_layers // 2 - 1, target.num_layers - 4),
            max_positions=target.max_positions,
        )

    @property
    def capture_layers(self) -> tuple[int, ...]:
        """The same features as ``ModelRunner.forward_with_features`` names them."""
        return tuple(layer + 1 for layer in self.aux_layers)

    @property
    def layer(self) -> ModelConfig:
        """The head's layer as a model of one layer."""
        return ModelConfig(
            model_type="llama",
            hidden_size=self.hidden_size,
            num_layers=1,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            vocab_size=self.draft_vocab_size,
            rms_norm_eps=self.rms_norm_eps,
            rope=self.rope,
            max_positions=self.max_positions,
        )


class Eagle3Model(nn.Module):
    """The head; embeddings are handed in.

    Attributes:
        config: its shape.
    """

    def __init__(
        self, config: Eagle3Config, *, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        """Allocate the weights without filling them; a loader does, by ``weight_targets``.

        Args:
            config: of the checkpoint.
            dtype: of weights, activations and rows.
            device: where it runs.
        """
        super().__init__()
        self.config = config
        size, eps, layer = config.hidden_size, config.rms_norm_eps, config.layer
        self._num_query_rows = config.num_heads * config.head_dim
        num_rows = self._num_query_rows + 2 * config.num_kv_heads * config.head_dim
        with torch.device("meta"):
            self.fc = Weight(size, 3 * size)
            self.hidden_norm = RMSNorm(size, eps)
            self.input_norm = RMSNorm(size, eps)
            self.attention = Attention(layer)
            self.attention.qkv_proj = Weight(num_rows, 2 * size)
            self.post_attention_norm = RMSNorm(size, eps)
            self.mlp = MLP(layer)
            self.norm = RMSNorm(size, eps)
            self.lm_head = Weight(config.draft_vocab_size, size)
        self.to_empty(device=device)
        self.to(dtype)
        frequencies = inverse_frequencies(config.rope, config.head_dim).to(device)
        self.register_buffer("frequencies", frequencies, persistent=False)
        ids = torch.zeros(config.draft_vocab_size, dtype=torch.int64, device=device)
        self.register_buffer("_draft_token_ids", ids, persistent=False)
        self._draft_token_ids: Tensor

    @property
    def draft_token_ids(self) -> Tensor:
        """[d] int64: the target's id of each token of the draft vocabulary."""
        return self._draft_token_ids

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and rows."""
        return self.fc.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.fc.weight.device

    def fuse(self, features: Tensor) -> Tensor:
        """Features [N, 3E] of the target as the layer takes them: [N, E]."""
        fused: Tensor = self.fc(features.to(self.dtype))
        return fused

    def write_rows(
        self,
        embedded_NE: Tensor,
        feature_NE: Tensor,
        positions: Tensor,
        slots: Tensor,
        kv_cache: KVCache,
    ) -> None:
        """Put the keys and values of rows into the pool, without what else the layer computes."""
        joined = self._joined(embedded_NE, feature_NE)
        weight = self.attention.qkv_proj.weight[self._num_query_rows :]
        shape = (-1, 2, self.config.num_kv_heads, self.config.head_dim)
        k_NKD, v_NKD = F.linear(joined, weight).view(shape).unbind(1)
        kv_cache.k[0].index_copy_(0, slots, rotate(k_NKD, self._rotation(positions)))
        kv_cache.v[0].index_copy_(0, slots, v_NKD)

    def forward(
        self, embedded_NE: Tensor, feature_NE: Tensor, batch: ForwardBatch, kv_cache: KVCache
    ) -> Tensor:
        """Run the layer on a batch's rows, and write theirs.

        Args:
            embedded_NE: of the token behind each row's position.
            feature_NE: fused, or the output of the row before.
            batch: positions, slots and spans; its token ids are not read.
            kv_cache: a pool of ``config.layer``.

        Returns:
            [N, E], before the final norm: the next step's feature.
        """
        ctx = LayerContext(
            rotation=self._rotation(batch.positions.to(self.device)),
            slots=batch.slots.to(self.device),
            groups=group_spans(batch, self.dtype, self.device),
        )
        joined = self._joined(embedded_NE, feature_NE)
        x_NE = feature_NE + self.attention(joined, kv_cache.k[0], kv_cache.v[0], ctx)
        streamed: Tensor = x_NE + self.mlp(self.post_attention_norm(x_NE))
        return streamed

    def logits(self, hidden_NE: Tensor) -> Tensor:
        """[N, d] over the draft vocabulary, float32."""
        scores: Tensor = self.lm_head(self.norm(hidden_NE))
        return scores.float()

    def weight_targets(self) -> dict[str, Tensor]:
        """Checkpoint names of all weights -> the (part of a) parameter each is copied into."""
        targets: dict[str, Tensor] = {
            "fc.weight": self.fc.weight,
            "midlayer.hidden_norm.weight": self.hidden_norm.weight,
            "midlayer.input_layernorm.weight": self.input_norm.weight,
            "midlayer.post_attention_layernorm.weight": self.post_attention_norm.weight,
            "norm.weight": self.norm.weight,
            "lm_head.weight": self.lm_head.weight,
        }
        attention, mlp = self.attention.weight_targets(), self.mlp.weight_targets()
        targets |= {f"midlayer.self_attn.{name}": tensor for name, tensor in attention.items()}
        targets |= {f"midlayer.mlp.{name}": tensor for name, tensor in mlp.items()}
        return targets

    def _joined(self, embedded_NE: Tensor, feature_NE: Tensor) -> Tensor:
        return torch.cat((self.input_norm(embedded_NE), self.hidden_norm(feature_NE)), dim=-1)

    def _rotation(self, positions: Tensor) -> Tensor:
        frequencies: Tensor = self.get_buffer("frequencies")
        return rotation_table(positions, frequencies, self.config.rope.amplitude, self.dtype)
