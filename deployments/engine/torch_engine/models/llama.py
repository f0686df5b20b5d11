"""The Llama family: a dense decoder over paged KV rows. Other families are variations of it.

N: tokens of the batch, M: rows whose logits are wanted, E: hidden size, H: heads, K: key-value
heads, D: head dimension, V: vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.engine.torch_engine.attention import attend, group_spans
from deployments.engine.torch_engine.kernels import wide
from deployments.engine.torch_engine.kernels.unpacking import unpack_rows
from deployments.engine.torch_engine.precision import compute_dtype
from deployments.engine.torch_engine.rotary import inverse_frequencies, rotate, rotation_table
from deployments.engine.types import FINAL_NORM

if TYPE_CHECKING:
    from deployments.engine.torch_engine.attention import SpanGroup
    from deployments.engine.torch_engine.forward_batch import ForwardBatch
    from deployments.engine.torch_engine.kernels.packing import PackedMatrix
    from deployments.engine.torch_engine.kv_cache import KVCache
    from deployments.engine.torch_engine.model_config import ModelConfig


class ForwardOutput(NamedTuple):
    """What one forward computed.

    Attributes:
        logits: [M, V] of the batch's ``logit_rows``, in the dtype it computes in.
        features: per captured layer [N, E], every row of the batch, in the model's dtype.
    """

    logits: Tensor
    features: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class LayerContext:
    """What all layers of one forward share."""

    rotation: Tensor
    slots: Tensor
    groups: tuple[SpanGroup, ...]


class Weight(nn.Module):
    """One matrix, allocated but not filled, with an optional bias.

    Attributes:
        packed: the same numbers as the file's quantised blocks, for narrow forwards.
    """

    def __init__(self, *shape: int, has_bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape), requires_grad=False)
        bias = nn.Parameter(torch.empty(shape[0]), requires_grad=False) if has_bias else None
        self.bias: nn.Parameter | None
        self.register_parameter("bias", bias)
        self.packed: PackedMatrix | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias``."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        if wide.is_suited(x):
            return wide.rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query attention with one fused projection for queries, keys and values.

    Attributes:
        has_qkv_bias: the family has biases that no setting of the checkpoint announces.
        has_head_norms: each head's queries and keys are normalised before their rotation.
        is_standard: these settings tell all; False where a family overrides ``forward``.
    """

    has_qkv_bias: ClassVar[bool] = False
    has_head_norms: ClassVar[bool] = False
    is_standard: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.qkv_proj = Weight(
            (config.num_heads + 2 * config.num_kv_heads) * config.head_dim,
            config.hidden_size,
            has_bias=config.attention_bias or self.has_qkv_bias,
        )
        self.o_proj = Weight(
            config.hidden_size,
            config.num_heads * config.head_dim,
            has_bias=config.attention_bias,
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if self.has_head_norms:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x_NE: Tensor, k_pool: Tensor, v_pool: Tensor, ctx: LayerContext) -> Tensor:
        """Write the new rows to the pools at ``ctx.slots``, then attend. [N, E]."""
        heads = self.qkv_proj(x_NE).view(x_NE.shape[0], -1, self.head_dim)
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q_NHD, k_NKD, v_NKD = torch.split(heads, sizes, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q_NHD, k_NKD = self.q_norm(q_NHD), self.k_norm(k_NKD)
        q_NHD = rotate(q_NHD, ctx.rotation)
        k_pool.index_copy_(0, ctx.slots, rotate(k_NKD, ctx.rotation).to(k_pool.dtype))
        v_pool.index_copy_(0, ctx.slots, v_NKD.to(v_pool.dtype))
        attended_NHD = attend(q_NHD, k_pool, v_pool, ctx.groups)
        projected: Tensor = self.o_proj(attended_NHD.flatten(1))
        return projected

    def weight_targets(self) -> dict[str, Tensor]:
        """Checkpoint names of this block's tensors -> where they go."""
        sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        targets: dict[str, Tensor] = {}
        for kind, fused in self.qkv_proj.named_parameters():
            parts = torch.split(fused, sizes)
            for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
                targets[f"{name}.{kind}"] = part
        for kind, tensor in self.o_proj.named_parameters():
            targets[f"o_proj.{kind}"] = tensor
        if self.q_norm is not None and self.k_norm is not None:
            targets["q_norm.weight"] = self.q_norm.weight
            targets["k_norm.weight"] = self.k_norm.weight
        return targets


class MLP(nn.Module):
    """Gated SiLU with one fused projection for gate and up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Weight(2 * config.intermediate_size, config.hidden_size)
        self.down_proj = Weight(config.hidden_size, config.intermediate_size)

    def forward(self, x_NE: Tensor) -> Tensor:
        """[N, E]."""
        gate, up = self.gate_up_proj(x_NE).chunk(2, dim=-1)
        output: Tensor = self.down_proj(F.silu(gate) * up)
        return output

    def weight_targets(self) -> dict[str, Tensor]:
        """Checkpoint names of this block's tensors -> where they go."""
        gate, up = torch.chunk(self.gate_up_proj.weight, 2)
        return {
            "gate_proj.weight": gate,
            "up_proj.weight": up,
            "down_proj.weight": self.down_proj.weight,
        }


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = attention
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_NE: Tensor, k_pool: Tensor, v_pool: Tensor, ctx: LayerContext) -> Tensor:
        """The residual stream behind this layer: [N, E]."""
        x_NE = x_NE + self.attention(self.input_norm(x_NE), k_pool, v_pool, ctx)
        streamed: Tensor = x_NE + self.mlp(self.post_attention_norm(x_NE))
        return streamed

    def weight_targets(self) -> dict[str, Tensor]:
        """Checkpoint names of this layer's tensors -> where they go."""
        targets: dict[str, Tensor] = {
            "input_layernorm.weight": self.input_norm.weight,
            "post_attention_layernorm.weight": self.post_attention_norm.weight,
        }
        targets |= {f"self_attn.{n}": t for n, t in self.attention.weight_targets().items()}
        targets |= {f"mlp.{n}": t for n, t in self.mlp.weight_targets().items()}
        return targets


class Model(nn.Module):
    """Token ids in, logits out; KV rows are written to and read from the pool."""

    attention_class: ClassVar[type[Attention]] = Attention

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        """Allocate the weights without filling them; a loader does, by ``weight_targets``."""
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.embed_tokens = Weight(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList(
                DecoderLayer(config, self.attention_class(config)) for _ in range(config.num_layers)
            )
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head: nn.Module = self.embed_tokens
            if not config.tie_word_embeddings:
                self.lm_head = Weight(config.vocab_size, config.hidden_size)
        self.to(dtype=dtype).to_empty(device=device)
        self.register_buffer(
            "rope_frequencies",
            inverse_frequencies(config.rope, config.head_dim).to(device),
            persistent=False,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights."""
        return self.embed_tokens.weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of activations and logits."""
        return compute_dtype(self.dtype, self.device.type)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.embed_tokens.weight.device

    def forward(
        self, batch: ForwardBatch, kv_cache: KVCache, capture_layers: tuple[int, ...] = ()
    ) -> ForwardOutput:
        """Run every new token of the batch through all layers.

        Args:
            batch: on the CPU.
            kv_cache: a pool with this model's number of layers; rows at ``batch.slots`` are
                overwritten.
            capture_layers: feature ``i`` is the residual stream that enters layer i;
                ``num_layers`` is the stream behind the last layer, before the final norm;
                ``FINAL_NORM`` is what lies behind that.
        """
        return self.compute(
            batch.token_ids.to(self.device),
            batch.positions.to(self.device),
            batch.slots.to(self.device),
            group_spans(batch, self.compute_dtype, self.device),
            batch.logit_rows.to(self.device),
            kv_cache,
            capture_layers,
        )

    def compute(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        groups: tuple[SpanGroup, ...],
        logit_rows: Tensor,
        kv_cache: KVCache,
        capture_layers: tuple[int, ...] = (),
    ) -> ForwardOutput:
        """``forward`` with everything on the model's device; nothing in here waits for a GPU."""
        frequencies: Tensor = self.get_buffer("rope_frequencies")
        amplitude = self.config.rope.amplitude
        ctx = LayerContext(
            rotation=rotation_table(positions, frequencies, amplitude, self.compute_dtype),
            slots=slots,
            groups=groups,
        )
        streams: dict[int, Tensor] = {}
        x_NE = self.embed(token_ids)
        for index, layer in enumerate(self.layers):
            if index in capture_layers:
                streams[index] = x_NE
            x_NE = layer(x_NE, kv_cache.k[index], kv_cache.v[index], ctx)
        streams[len(self.layers)] = x_NE
        if FINAL_NORM in capture_layers:
            streams[FINAL_NORM] = self.norm(x_NE)
        x_ME = self.norm(x_NE.index_select(0, logit_rows))
        return ForwardOutput(
            self.lm_head(x_ME), tuple(streams[i].to(self.dtype) for i in capture_layers)
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        """What enters the first layer, also where ``drop_dense`` left only blocks: [N, E]."""
        table = self.embed_tokens
        if table.packed is None or table.weight.numel():
            return F.embedding(token_ids, table.weight).to(self.compute_dtype)
        rows = torch.empty(token_ids.shape[0], self.config.hidden_size)
        unpack_rows(table.packed, token_ids.numpy(), rows.numpy())
        return rows.to(self.compute_dtype)

    def drop_dense(self) -> None:
        """Give back the dense copies of packed matrices, where compiled code computes all."""
        for weight in self.modules():
            if isinstance(weight, Weight) and weight.packed:
                weight.weight = nn.Parameter(weight.weight.new_empty(0), requires_grad=False)

    def weight_targets(self) -> dict[str, Tensor]:
        """Checkpoint names of all tensors -> the (part of a) parameter each is copied into."""
        targets: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embed_tokens.weight,
            "model.norm.weight": self.norm.weight,
        }
        if not self.config.tie_word_embeddings:
            targets["lm_head.weight"] = self.lm_head.get_parameter("weight")
        for index, layer in enumerate(self.layers):
            own = cast("DecoderLayer", layer).weight_targets()
            targets |= {f"model.layers.{index}.{name}": tensor for name, tensor in own.items()}
        return targets
