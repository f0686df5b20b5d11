"""How several prefills share the token budget of one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def share_budget(num_uncomputed: Sequence[int], budget: int) -> list[int]:
    """Half of the budget for the first in line, the rest for whoever has least left to compute.

    The first one is slowed down no more than twofold by all that come after it, so every prefill
    ends once it is first. A short prompt does not wait for the end of a long one, and prompts of
    one length are computed one after the other, which ends each of them soonest.

    Args:
        num_uncomputed: tokens each prefill has left, first in line first.
        budget: tokens to give away, at least 0.

    Returns:
        Tokens for each prefill, in order; all of the budget if there is work for it.
    """
    shares = [0] * len(num_uncomputed)
    if shares:
        shares[0] = min(num_uncomputed[0], budget - budget // 2)
        budget -= shares[0]
    left = [total - share for total, share in zip(num_uncomputed, shares, strict=True)]
    for index in sorted(range(len(left)), key=left.__getitem__):
        share = min(left[index], budget)
        shares[index] += share
        budget -= share
    return shares
