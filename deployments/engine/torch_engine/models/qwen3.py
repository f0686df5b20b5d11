"""Qwen3 (dense): Llama with a norm on each head's queries and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from deployments.engine.torch_engine.models import llama

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.torch_engine.model_config import ModelConfig


class Attention(llama.Attention):
    """Queries and keys are normalised over the head dimension before they are rotated."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.q_norm = llama.RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = llama.RMSNorm(config.head_dim, config.rms_norm_eps)

    def normalise(self, q_NHD: Tensor, k_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """Each head to unit root mean square, times the learned scale."""
        return self.q_norm(q_NHD), self.k_norm(k_NKD)

    def weight_targets(self) -> dict[str, Tensor]:
        """Checkpoint names of this block's tensors -> where they go."""
        norms = {"q_norm.weight": self.q_norm.weight, "k_norm.weight": self.k_norm.weight}
        return super().weight_targets() | norms


class Model(llama.Model):
    """The Qwen3 family."""

    attention_class: ClassVar[type[llama.Attention]] = Attention
