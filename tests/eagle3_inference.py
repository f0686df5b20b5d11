"""An EAGLE-3 head as inference computes it: token by token, written without the training's code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from deployments.engine.training.batches import FeatureText
    from deployments.engine.training.eagle3 import Eagle3Head


@torch.no_grad()
def drafted_one_by_one(
    head: Eagle3Head, embedding: Tensor, text: FeatureText, at: int, num_steps: int
) -> list[Tensor]:
    """Logits of each draft step behind position ``at``, fed with the text's own tokens.

    Committed rows come one by one, from the target's features; behind them the head reads its own
    output.
    """
    fused = head.fuse(text.features.float())
    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    feature = fused[0]
    for position in range(at + num_steps):
        feature = fused[position] if position <= at else feature
        token = int(text.token_ids[position + 1])
        attention = head.midlayer.self_attn
        embedded = head.midlayer.input_layernorm(embedding[token])
        joined = torch.cat((embedded, head.midlayer.hidden_norm(feature)))
        q, k, v = (
            getattr(attention, name)(joined).view(-1, attention.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        angles = position * attention.get_buffer("frequencies")
        q, k = (_rotated(x, angles) for x in (q, k))
        keys.append(k)
        values.append(v)
        group = q.shape[0] // k.shape[0]
        all_k = torch.stack(keys).repeat_interleave(group, dim=1)
        all_v = torch.stack(values).repeat_interleave(group, dim=1)
        weights = torch.einsum("hd,thd->ht", q, all_k).div(attention.head_dim**0.5).softmax(-1)
        x = feature + attention.o_proj(torch.einsum("ht,thd->hd", weights, all_v).flatten())
        feature = x + head.midlayer.mlp(head.midlayer.post_attention_layernorm(x))
        outputs.append(head.logits(feature))
    return outputs[at:]


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
