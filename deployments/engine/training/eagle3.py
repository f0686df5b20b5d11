"""The EAGLE-3 draft head as it is trained: one decoder layer that reads features of its target.

At position t it sees the embedding of token t + 1 and a feature g: for committed text the target's
own, fused by ``fc``; behind it the head's own output. It scores what comes at t + 2. Modules are
named as in the ``LlamaForCausalLMEagle3`` checkpoints that SGLang loads.

Source: EAGLE-3 (arXiv:2503.01840).

B: sequences, T: positions, E: hidden size of the target, H: heads, K: key-value heads, D: head
dimension, d: draft vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deployments.engine.torch_engine.rotary import inverse_frequencies
from deployments.engine.training.batches import left
from deployments.engine.training.draft_module import DraftModule
from deployments.engine.training.layers import MLP, gathered, layer_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch.distributed.tensor.parallel import ParallelStyle

    from deployments.engine.torch_engine.eagle3 import Eagle3Config
    from deployments.engine.training.batches import FeatureBatch


class Rows(NamedTuple):
    """Keys (rotated) and values of one step: [B, T, K, D] each."""

    keys: Tensor
    values: Tensor


class HeadOutput(NamedTuple):
    """One step of the head.

    Attributes:
        hidden: [B, T, E], before the final norm: the next step's feature.
        rows: what this step's positions are attended by later.
    """

    hidden: Tensor
    rows: Rows


class SelfAttention(nn.Module):
    """Grouped-query attention whose input is twice as wide as its output."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, size = 2 * config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, config.num_heads * size, bias=False)
        self.k_proj = nn.Linear(width, config.num_kv_heads * size, bias=False)
        self.v_proj = nn.Linear(width, config.num_kv_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * size, config.hidden_size, bias=False)
        frequencies = inverse_frequencies(config.rope, size)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(
        self, x_BTE: Tensor, positions_BT: Tensor, steps: tuple[Rows, ...], mask: Tensor
    ) -> tuple[Tensor, Rows]:
        """Attend to the first step's rows as the mask says, and to the position's own rows since.

        Args:
            x_BTE: [B, T, 2E].
            positions_BT: of the rotation.
            steps: rows of the steps before this one; empty at the first.
            mask: [T, S] bool over the first step's rows.
        """
        B, T, _ = x_BTE.shape
        q = self.q_proj(x_BTE).view(B, T, -1, self.head_dim)
        k = self.k_proj(x_BTE).view(B, T, -1, self.head_dim)
        v = self.v_proj(x_BTE).view(B, T, -1, self.head_dim)
        frequencies: Tensor = self.get_buffer("frequencies")
        angles = positions_BT.float().unsqueeze(-1) * frequencies
        cos, sin = angles.cos().to(q.dtype).unsqueeze(2), angles.sin().to(q.dtype).unsqueeze(2)
        q, own = _rotate(q, cos, sin), Rows(_rotate(k, cos, sin), v)
        first, *later = (*steps, own)
        # Counted on the tensors: under tensor parallelism a process holds a share of the heads.
        q = q.view(B, T, k.shape[2], -1, self.head_dim) * self.head_dim**-0.5
        shared = torch.einsum("btkgd,bskd->btkgs", q, first.keys)
        shared = shared.masked_fill(~mask[:, None, None, :], -torch.inf)
        diagonal = [torch.einsum("btkgd,btkd->btkg", q, rows.keys).unsqueeze(-1) for rows in later]
        weights = torch.cat((shared, *diagonal), dim=-1).float().softmax(-1).to(q.dtype)
        size = first.keys.shape[1]
        mixed = torch.einsum("btkgs,bskd->btkgd", weights[..., :size], first.values)
        for at, rows in enumerate(later):
            mixed = mixed + weights[..., size + at, None] * rows.values.unsqueeze(3)
        return self.o_proj(mixed.reshape(B, T, -1)), own


class MidLayer(nn.Module):
    """The decoder layer; the residual stream is the feature, not the embedding."""

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = SelfAttention(config)
        self.mlp = MLP(size, config.intermediate_size)
        self.hidden_norm = nn.RMSNorm(size, eps)
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)

    def forward(
        self,
        embedded_BTE: Tensor,
        feature_BTE: Tensor,
        positions_BT: Tensor,
        steps: tuple[Rows, ...],
        mask: Tensor,
    ) -> HeadOutput:
        """One step at every position."""
        joined = torch.cat(
            (self.input_layernorm(embedded_BTE), self.hidden_norm(feature_BTE)), dim=-1
        )
        attended, rows = self.self_attn(joined, positions_BT, steps, mask)
        x_BTE = feature_BTE + attended
        return HeadOutput(x_BTE + self.mlp(self.post_attention_layernorm(x_BTE)), rows)


class Eagle3Head(DraftModule):
    """The whole head. Embeddings are the target's own and are handed in."""

    def __init__(self, config: Eagle3Config) -> None:
        """Random weights; ``d2t`` and ``t2d`` name the first tokens until they are set."""
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.fc = nn.Linear(3 * size, size, bias=False)
        self.midlayer = MidLayer(config)
        self.norm = nn.RMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)

    @property
    def draft_token_ids(self) -> Tensor:
        """[d] int64: the target's id of each token of the draft vocabulary."""
        offsets: Tensor = self.get_buffer("d2t")
        return torch.arange(offsets.shape[0], device=offsets.device) + offsets

    def set_draft_vocabulary(self, token_ids: Tensor) -> None:
        """Say which tokens may be drafted.

        Args:
            token_ids: [d] ascending, without repetition.

        Raises:
            ValueError: they are not that.
        """
        ids = token_ids.long()
        count, vocab_size = self.config.draft_vocab_size, self.config.vocab_size
        is_ascending = bool((ids[1:] > ids[:-1]).all())
        if ids.shape != (count,) or not is_ascending or ids[0] < 0 or ids[-1] >= vocab_size:
            raise ValueError(f"a draft vocabulary is {count} ascending ids below {vocab_size}")
        self.get_buffer("d2t").copy_(ids - torch.arange(count))
        self.get_buffer("t2d").zero_()[ids] = True

    def fuse(self, features: Tensor) -> Tensor:
        """Features [..., 3E] of the target as the layer takes them: [..., E]."""
        fused: Tensor = self.fc(features)
        return fused

    def forward(
        self,
        embedded_BTE: Tensor,
        feature_BTE: Tensor,
        positions_BT: Tensor,
        steps: tuple[Rows, ...],
        mask: Tensor,
    ) -> HeadOutput:
        """One step; see ``SelfAttention.forward`` for ``steps`` and ``mask``."""
        output: HeadOutput = self.midlayer(embedded_BTE, feature_BTE, positions_BT, steps, mask)
        return output

    def unrolled(
        self, embedding_VE: Tensor, batch: FeatureBatch, num_steps: int
    ) -> Iterator[Tensor]:
        """The first step reads the target's features, every further one the step before.

        At position t a step attends to what drafting there would have: the rows of committed text
        up to t, and the head's own rows of the steps in between.
        """
        num_positions = batch.token_ids.shape[1]
        rows = torch.arange(num_positions, device=batch.token_ids.device)
        causal = rows[:, None] >= rows[None, :]
        feature = self.fuse(batch.features)
        steps: tuple[Rows, ...] = ()
        for step in range(num_steps):
            embedded = F.embedding(left(batch.token_ids, step + 1), embedding_VE)
            positions = (rows + step).expand(batch.token_ids.shape[0], -1)
            output: HeadOutput = self(embedded.to(feature.dtype), feature, positions, steps, causal)
            steps = (*steps, output.rows)
            feature = output.hidden
            yield feature

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] of a step's ``hidden``."""
        scores: Tensor = self.lm_head(self.norm(hidden))
        return scores

    def rebuilt(self, weights: Mapping[str, Tensor], feature_scale: Tensor) -> Eagle3Head:
        """The scale goes into the fusion."""
        head = Eagle3Head(self.config)
        head.load_state_dict(weights)
        with torch.no_grad():
            head.fc.weight.div_(feature_scale)
        return head.eval()

    def tensor_plan(self) -> dict[str, ParallelStyle]:
        """Attention and feed-forward in place; fusion and vocabulary are put together again."""
        return layer_plan("midlayer") | {"fc": gathered(), "lm_head": gathered()}

    def save(self, folder: Path) -> None:
        """The ``LlamaForCausalLMEagle3`` folder, in bfloat16."""
        from deployments.engine.training.checkpoint import save_head

        save_head(self, folder, torch.bfloat16)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
