"""A student in training: kept layers of its target and the map between them, over whole texts.

The same numbers as ``torch_engine.student`` computes over KV pages, in a form that gradients pass.

B: sequences, T: positions, E: hidden size, H: heads, K: key-value heads, D: head dimension,
N = B * T, d: draft vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import SequenceParallel
from torch.nn import functional as F

from deployments.engine.errors import UnsupportedModelError
from deployments.engine.torch_engine.kernels.vectors import BLOCK
from deployments.engine.torch_engine.models import model_class
from deployments.engine.torch_engine.rotary import inverse_frequencies, rotate, rotation_table
from deployments.engine.torch_engine.student import in_eight_bits, write_student
from deployments.engine.training.batches import left
from deployments.engine.training.draft_module import DraftModule
from deployments.engine.training.layers import MLP, gathered, layer_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch.distributed.tensor.parallel import ParallelStyle

    from deployments.engine.torch_engine.model_config import ModelConfig
    from deployments.engine.torch_engine.models.llama import Attention, DecoderLayer, Model
    from deployments.engine.torch_engine.student import StudentWeights
    from deployments.engine.training.batches import FeatureBatch

_FINAL_NORM = "model.norm.weight"


class SelfAttention(nn.Module):
    """A target's attention over whole texts, its projections apart as checkpoints name them.

    Attributes:
        has_head_norms: each head's queries and keys are normalised before their rotation.
    """

    def __init__(self, config: ModelConfig, kind: type[Attention]) -> None:
        super().__init__()
        size, width = config.hidden_size, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        has_bias = config.attention_bias or kind.has_qkv_bias
        self.head_dim = config.head_dim
        self.has_head_norms = kind.has_head_norms
        self.q_proj = nn.Linear(size, width, bias=has_bias)
        self.k_proj = nn.Linear(size, kv_width, bias=has_bias)
        self.v_proj = nn.Linear(size, kv_width, bias=has_bias)
        self.o_proj = nn.Linear(width, size, bias=config.attention_bias)
        if self.has_head_norms:
            self.q_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x_BTE: Tensor, table: Tensor) -> Tensor:
        """[B, T, E]; ``table`` rotates the N positions."""
        # Heads are counted on the tensors: a tensor-parallel process holds a share of them.
        q, k, v = (
            projection(x_BTE).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.has_head_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = table.to(v.dtype)
        q, k = (rotate(part.flatten(0, 1), turned).view_as(part) for part in (q, k))
        q_BHTD, k_BKTD, v_BKTD = (part.transpose(1, 2).to(v.dtype) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(
            q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=True
        )
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output


class StudentLayer(nn.Module):
    """One of the target's decoder layers, named as in its checkpoint."""

    def __init__(self, config: ModelConfig, kind: type[Attention]) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.self_attn = SelfAttention(config, kind)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = MLP(size, config.intermediate_size)

    def forward(self, x_BTE: Tensor, table: Tensor) -> Tensor:
        """The stream behind the layer: [B, T, E]."""
        x_BTE = x_BTE + self.self_attn(self.input_layernorm(x_BTE), table)
        streamed: Tensor = x_BTE + self.mlp(self.post_attention_layernorm(x_BTE))
        return streamed


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
            StudentLayer(config, attention_class) for _ in student.kept_layers
        )
        self.connector = nn.Linear(size, size)
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
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
                layer.load_state_dict(cast("DecoderLayer", target.layers[kept]).weight_targets())
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
        x_BTE = F.embedding(token_ids_BT, embedding_VE)
        for index, layer in enumerate(self.layers):
            if index == self._student.joint:
                x_BTE = self.connector(x_BTE).to(x_BTE.dtype)
            x_BTE = layer(x_BTE, table)
        return x_BTE

    def unrolled(
        self, embedding_VE: Tensor, batch: FeatureBatch, num_steps: int
    ) -> Iterator[Tensor]:
        """A student reads tokens only, so one forward over the true ones holds every step."""
        stream = self(batch.token_ids, embedding_VE)
        for step in range(num_steps):
            yield left(stream, step + 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d]."""
        return F.linear(self.norm(hidden), self.get_buffer("head_rows"))

    def rebuilt(self, weights: Mapping[str, Tensor], feature_scale: Tensor) -> StudentModel:
        """The same shape, filled."""
        model = StudentModel(self.config, self._student)
        model.load_state_dict(weights)
        return model.eval()

    def tensor_plan(self) -> dict[str, ParallelStyle]:
        """Every layer; embedding and head are not trained and stay whole."""
        plan = {"connector": gathered()}
        for index, layer in enumerate(self.layers):
            plan |= layer_plan(f"layers.{index}")
            if cast("StudentLayer", layer).self_attn.has_head_norms:
                for name in ("q_norm", "k_norm"):
                    heads = SequenceParallel(sequence_dim=2, use_local_output=True)
                    plan[f"layers.{index}.self_attn.{name}"] = heads
        return plan

    def save(self, folder: Path) -> None:
        """``student.safetensors``, matrices in eight bits."""
        write_student(self.weights(), folder / "student.safetensors")

    def weights(self) -> StudentWeights:
        """The student as files hold it."""
        trained = {
            f"model.layers.{index}.{name}": in_eight_bits(tensor)
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.state_dict().items()
        }
        return replace(
            self._student,
            connector_weight=self.connector.weight.detach().float().cpu(),
            connector_bias=self.connector.bias.detach().float().cpu(),
            logit_scale=1.0,
            trained=trained | {_FINAL_NORM: in_eight_bits(self.norm.weight)},
        )
