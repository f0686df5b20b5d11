"""Which texts make which optimiser step: a pure function of lengths, seed and epoch."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def plan_epoch(
    lengths: Sequence[int], *, batch_tokens: int, accumulate: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The steps of one pass.

    Texts are shuffled, then put into batches with their neighbours in length within a window, so
    that little is padded and the order stays random.

    Args:
        lengths: tokens of each text.
        batch_tokens: of one batch, padding included; at least one text.
        accumulate: batches of one step; the last step may have fewer.
        seed: of the run.
        epoch: counted from 0.

    Returns:
        Steps, each a list of batches, each a list of indices into ``lengths``.
    """
    shuffler = random.Random(f"{seed}/{epoch}")  # noqa: S311 - no secret, the same on all machines
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    window = 16 * max(1, batch_tokens // max(1, sum(lengths) // max(1, len(lengths))))
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda index: (lengths[index], index))
        batches.extend(_fill(near, lengths, batch_tokens))
    shuffler.shuffle(batches)
    return [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]


def share(batch: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The texts of a batch that one of several processes takes."""
    return list(batch[rank::world_size])


def _fill(near: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    for index in near:
        # Lengths ascend, so this one is the batch's widest.
        if batches[-1] and (len(batches[-1]) + 1) * lengths[index] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return [batch for batch in batches if batch]
