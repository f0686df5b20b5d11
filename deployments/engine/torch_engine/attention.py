"""Attention of a batch's spans over rows of the KV pool.

N: tokens of the batch, B: spans of a group, Q: new tokens of a span, L: rows a span sees (padded),
H: heads, K: key-value heads, D: head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan

_MAX_GROUPED_QUERY = 64
"""Longer spans (prefill chunks) keep the machine busy alone; padding them would only cost."""


@dataclass(frozen=True, slots=True)
class SpanGroup:
    """Spans of one length that are attended together.

    Attributes:
        rows: [B * Q] int64, their rows in the batch.
        slots: [B * L] int64; short spans repeat their last slot, which the mask hides.
        mask: [B, 1, Q, L], additive; None where ``is_causal`` or nothing is hidden.
        is_causal: the span has no earlier rows, so a plain causal mask fits.
    """

    rows: Tensor
    slots: Tensor
    num_spans: int
    mask: Tensor | None
    is_causal: bool


def group_spans(
    batch: ForwardBatch, dtype: torch.dtype, device: torch.device
) -> tuple[SpanGroup, ...]:
    """Lay out a batch's attention once, for all layers.

    Spans share a group if they have the same length and their contexts are within a factor of two,
    which bounds the padding.

    Args:
        batch: the forward's spans.
        dtype: of the queries, hence of the masks.
        device: where the forward runs.
    """

    def kind(span: SequenceSpan) -> tuple[int, int, int]:
        alone = span.start if span.length > _MAX_GROUPED_QUERY else -1
        return span.length, span.kv_slots.shape[0].bit_length(), alone

    spans = sorted(batch.spans, key=kind)
    return tuple(_group(list(members), dtype, device) for _, members in groupby(spans, kind))


def _group(spans: Sequence[SequenceSpan], dtype: torch.dtype, device: torch.device) -> SpanGroup:
    length = spans[0].length
    lengths_L = [span.kv_slots.shape[0] for span in spans]
    longest = max(lengths_L)
    rows = torch.cat([torch.arange(span.start, span.start + length) for span in spans])
    slots = torch.cat([_pad(span.kv_slots, longest) for span in spans])
    is_causal = len(spans) == 1 and spans[0].tail_mask is None and longest == length > 1
    sees_all = length == 1 and min(lengths_L) == longest and all(s.tail_mask is None for s in spans)
    mask = None
    if not (is_causal or sees_all):
        visible = torch.stack([visible_rows(span, longest) for span in spans]).unsqueeze(1)
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf).to(device)
    return SpanGroup(rows.to(device), slots.to(device), len(spans), mask, is_causal)


def _pad(slots: Tensor, length: int) -> Tensor:
    missing = length - slots.shape[0]
    return torch.cat((slots, slots[-1:].expand(missing))) if missing else slots


def visible_rows(span: SequenceSpan, longest: int) -> Tensor:
    """[Q, longest] bool: which rows each new row of a span sees."""
    num_rows = span.kv_slots.shape[0]
    tail = span.tail_mask
    if tail is None:
        tail = torch.ones(span.length, span.length, dtype=torch.bool).tril()
    visible = torch.zeros(span.length, longest, dtype=torch.bool)
    visible[:, : num_rows - tail.shape[1]] = True
    visible[:, num_rows - tail.shape[1] : num_rows] = tail
    return visible


def attend(q_NHD: Tensor, k_pool: Tensor, v_pool: Tensor, groups: Sequence[SpanGroup]) -> Tensor:
    """Softmax attention of every new token over the rows its span sees.

    Args:
        q_NHD: rotated queries.
        k_pool: [num_slots, K, D], one layer's keys; the batch's own rows are already in it.
        v_pool: same shape.
        groups: from ``group_spans``.

    Returns:
        [N, H, D].
    """
    num_heads, head_dim = q_NHD.shape[1:]
    output_NHD = torch.empty_like(q_NHD)
    for group in groups:
        B = group.num_spans
        q_BQHD = q_NHD.index_select(0, group.rows).view(B, -1, num_heads, head_dim)
        k_BLKD = k_pool.index_select(0, group.slots).to(q_NHD.dtype).view(B, -1, *k_pool.shape[1:])
        v_BLKD = v_pool.index_select(0, group.slots).to(q_NHD.dtype).view(B, -1, *v_pool.shape[1:])
        if q_NHD.is_cuda and group.mask is not None:
            attended = attend_folded(q_BQHD, k_BLKD, v_BLKD, group.mask).flatten(0, 1)
        else:
            attended_BHQD = F.scaled_dot_product_attention(
                q_BQHD.transpose(1, 2),
                k_BLKD.transpose(1, 2),
                v_BLKD.transpose(1, 2),
                attn_mask=group.mask,
                is_causal=group.is_causal,
                enable_gqa=num_heads != k_pool.shape[1],
            )
            attended = attended_BHQD.transpose(1, 2).reshape(-1, num_heads, head_dim)
        output_NHD.index_copy_(0, group.rows, attended)
    return output_NHD


def attend_folded(q_BQHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor, mask: Tensor) -> Tensor:
    """Masked attention without grouped heads: heads that share keys become rows of one head.

    torch's fused CUDA kernels take a mask or grouped heads, not both; with both it falls back to
    one that writes all scores to memory.

    Args:
        q_BQHD: queries.
        k_BLKD: keys.
        v_BLKD: values.
        mask: [B, 1, Q, L], additive.

    Returns:
        [B, Q, H, D].
    """
    B, Q, H, D = q_BQHD.shape
    K = k_BLKD.shape[2]
    rows_BKRD = q_BQHD.view(B, Q, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    attended_BKRD = F.scaled_dot_product_attention(
        rows_BKRD,
        k_BLKD.transpose(1, 2),
        v_BLKD.transpose(1, 2),
        attn_mask=mask.repeat(1, 1, H // K, 1),
    )
    return attended_BKRD.view(B, K, H // K, Q, D).permute(0, 3, 1, 2, 4).reshape(B, Q, H, D)
