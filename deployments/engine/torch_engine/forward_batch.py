"""What one model forward computes. Tokens of all sequences are concatenated, without padding.

Positions are kept apart from slots: a token's rotary position says where it stands in its text, its
slot where its KV row lies in the pool (slot = page * PAGE_TOKENS + offset). Chains, trees, prefill
chunks and a drafter's branches are all the same thing: new rows that see some earlier rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpan:
    """One sequence's part of a batch.

    Attributes:
        start: index of its first new token in the batch.
        length: number of new tokens (Q).
        kv_slots: [L] int64, slots of every KV row it may see, in order, the Q new rows last.
        tail_mask: None for causal new rows; else [Q, T] bool, True where new row q may see the
            t-th of the last T kv_slots (T >= Q). All rows before the last T are visible to all.
    """

    start: int
    length: int
    kv_slots: Tensor
    tail_mask: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One forward. Its tensors live on the CPU, where they are made; the model moves them at once.

    Attributes:
        token_ids: [N] int64.
        positions: [N] int64.
        slots: [N] int64, where each new token's KV row is written.
        spans: in batch order, covering all N tokens.
        logit_rows: [M] int64, batch rows whose logits are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    spans: tuple[SequenceSpan, ...]
    logit_rows: Tensor
