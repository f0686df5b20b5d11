"""A student in training: kept layers of its target and the map between them, over whole texts.

The same numbers as ``torch_engine.student`` computes over KV pages, in a form that gradients pass.

B: sequences, T: positions, E: hidden size, N = B * T, d: draft vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.kernels.vectors import BLOCK
from deployments.engine.torch_engine.models import model_class
from deployments.engine.torch_engine.models.llama import DecoderLayer, RMSNorm
from deployments.engine.torch_engine.rotary import inverse_frequencies, rotate, rotation_table
from deployments.engine.torch_engine.student import in_eight_bits, write_student
from deployments.engine.training.batches import left
from deployments.engine.training.draft_module import DraftModule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from deployments.engine.torch_engine.model_config import ModelConfig
    from deployments.engine.torch_engine.models.llama import Model
    from deployments.engine.torch_engine.student import StudentWeights
    from deployments.engine.training.batches import FeatureBatch

_FINAL_NORM = "model.norm.weight"


class StudentModel(DraftModule):
    """Tokens in, streams out. Embedding and head are the target's and stay as they are."""

    def __init__(self, config: ModelConfig, student: StudentWeights) -> None:
        """Allocate a student; ``from_target`` or a state fills it.

        Args:
            config: the target's.
            student: which layers, which tokens.

        Raises:
            UnsupportedModelError: the target's attention is not plain causal, or its widths do not
                fit the blocks of eight-bit matrices.
        """
        super().__init__()
        attention_class = model_class(config.model_type).attention_class
        if not attention_class.is_standard:
            raise UnsupportedModelError(
                f"{config.model_type} has an attention of its own: its students are not trained"
            )
        size = config.hidden_size
        columns = {size, config.num_heads * config.head_dim, config.intermediate_size}
        if any(count % BLOCK for count in columns):
            raise UnsupportedModelError(
                f"a trained student's matrices have columns in multiples of {BLOCK}, not "
                f"{sorted(columns)}"
            )
        self.config = config
        self._student = student
        self.layers = nn.ModuleList(
            DecoderLayer(config, attention_class(config)) for _ in student.kept_layers
        )
        self.connector = nn.Linear(size, size)
        self.norm = RMSNorm(size, config.rms_norm_eps)
        self.requires_grad_(True)
        can_draft = torch.zeros(config.vocab_size, dtype=torch.bool)
        can_draft[student.draft_token_ids.long()] = True
        frequencies = inverse_frequencies(config.rope, config.head_dim)
        self.register_buffer("t2d", can_draft)
        self.register_buffer("head_rows", torch.empty(len(student.draft_token_ids), size))
        self.register_buffer("frequencies", frequencies, persistent=False)

    @classmethod
    def from_target(cls, target: Model, student: StudentWeights) -> StudentModel:
        """A student that begins with its target's layers, in float32 and on the CPU.

        Args:
            target: dense, on any device.
            student: fitted in closed form.
        """
        model = cls(target.config, student)
        with torch.no_grad():
            for layer, kept in zip(model.layers, student.kept_layers, strict=True):
                layer.load_state_dict(target.layers[kept].state_dict())
            model.connector.weight.copy_(student.connector_weight)
            model.connector.bias.copy_(student.connector_bias)
            model.norm.weight.copy_(target.norm.weight.float() * student.logit_scale)
            rows = target.lm_head.get_parameter("weight")
            ids = student.draft_token_ids.long().to(rows.device)
            model.get_buffer("head_rows").copy_(rows[ids])
        return model

    @property
    def draft_token_ids(self) -> Tensor:
        """[d] int64."""
        return self.get_buffer("t2d").nonzero().squeeze(1)

    def forward(self, token_ids_BT: Tensor, embedding_VE: Tensor) -> Tensor:
        """The stream behind the last layer: [B, T, E]."""
        B, T = token_ids_BT.shape
        positions = torch.arange(T, device=token_ids_BT.device).repeat(B)
        frequencies: Tensor = self.get_buffer("frequencies")
        amplitude = self.config.rope.amplitude
        table = rotation_table(positions, frequencies, amplitude, torch.float32)
        x_NE = F.embedding(token_ids_BT.flatten(), embedding_VE)
        for index, layer in enumerate(self.layers):
            if index == self._student.joint:
                x_NE = self.connector(x_NE).to(x_NE.dtype)
            x_NE = _forward_layer(cast("DecoderLayer", layer), x_NE, table, B)
        return x_NE.view(B, T, -1)

    def unrolled(
        self, embedding_VE: Tensor, batch: FeatureBatch, num_steps: int
    ) -> Iterator[Tensor]:
        """A student reads tokens only, so one forward over the true ones holds every step."""
        stream = self(batch.token_ids, embedding_VE)
        for step in range(num_steps):
            yield left(stream, step + 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d]."""
        return F.linear(_normed(self.norm, hidden), self.get_buffer("head_rows"))

    def rebuilt(self, weights: Mapping[str, Tensor], feature_scale: Tensor) -> StudentModel:
        """The same shape, filled."""
        model = StudentModel(self.config, self._student)
        model.load_state_dict(weights)
        return model.eval()

    def save(self, folder: Path) -> None:
        """``student.safetensors``, matrices in eight bits."""
        write_student(self.weights(), folder / "student.safetensors")

    def weights(self) -> StudentWeights:
        """The student as files hold it."""
        trained = {
            f"model.layers.{index}.{name}": in_eight_bits(tensor)
            for index, layer in enumerate(self.layers)
            for name, tensor in cast("DecoderLayer", layer).weight_targets().items()
        }
        return replace(
            self._student,
            connector_weight=self.connector.weight.detach().float().cpu(),
            connector_bias=self.connector.bias.detach().float().cpu(),
            logit_scale=1.0,
            trained=trained | {_FINAL_NORM: in_eight_bits(self.norm.weight)},
        )


def _forward_layer(layer: DecoderLayer, x_NE: Tensor, table: Tensor, num_texts: int) -> Tensor:
    attention = layer.attention
    sizes = [attention.num_heads, attention.num_kv_heads, attention.num_kv_heads]
    normed_NE = _normed(layer.input_norm, x_NE)
    heads = attention.qkv_proj(normed_NE).view(x_NE.shape[0], -1, attention.head_dim)
    q_NHD, k_NKD, v_NKD = torch.split(heads, sizes, dim=1)
    if attention.q_norm is not None and attention.k_norm is not None:
        q_NHD, k_NKD = _normed(attention.q_norm, q_NHD), _normed(attention.k_norm, k_NKD)
    turned = table.to(heads.dtype)
    q, k, v = (
        part.view(num_texts, -1, *part.shape[1:]).transpose(1, 2).to(heads.dtype)
        for part in (rotate(q_NHD, turned), rotate(k_NKD, turned), v_NKD)
    )
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x_NE = x_NE + attention.o_proj(attended.transpose(1, 2).reshape(x_NE.shape[0], -1))
    mlp = layer.mlp
    gate, up = mlp.gate_up_proj(_normed(layer.post_attention_norm, x_NE)).chunk(2, dim=-1)
    return x_NE + cast("Tensor", mlp.down_proj(F.silu(gate) * up))


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
