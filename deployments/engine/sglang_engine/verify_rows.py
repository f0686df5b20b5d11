"""Where the nodes of drafts stand in the batch that verifies them; knows nothing of SGLang.

SGLang's batches are rectangles. Row 0 of a sequence is its last committed token, row i + 1 is node
i of its draft; rows behind those are padding that no other row sees and that is a child of nobody.

B: sequences, W: rows of each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from deployments.engine.speculation.types import DraftTree

_NOBODY = -1
_MAX_SHAPES = 4096
_MAX_BATCHES = 256
"""Most drafts are chains of a few lengths, so few shapes are in use at a time."""


class VerifyRows(NamedTuple):
    """A batch of drafts, on the host. All but the tokens is shared between steps and never written.

    Attributes:
        tokens: [B, W] int64.
        depths: [B, W] int64; tokens between the row and the last committed one, itself included.
        sees: [B, W, W] bool; whether a row attends to another one of its sequence: to itself and
            to its ancestors.
        first_child: [B, W] int64; -1 where there is none.
        next_sibling: [B, W] int64; likewise.
    """

    tokens: Tensor
    depths: Tensor
    sees: Tensor
    first_child: Tensor
    next_sibling: Tensor


def verify_rows(
    last_token_ids: Sequence[int], trees: Sequence[DraftTree], width: int
) -> VerifyRows:
    """Lay out a step.

    Args:
        last_token_ids: the last committed token of each sequence.
        trees: the draft of each, shorter than ``width``.
        width: W.
    """
    tokens = np.empty((len(trees), width), dtype=np.int64)
    # What padding holds is nobody's business; a token that the model knows does no harm.
    tokens[:] = np.asarray(last_token_ids, dtype=np.int64)[:, None]
    for row, tree in zip(tokens, trees, strict=True):
        row[1 : 1 + len(tree)] = tree.token_ids
    shapes = tuple(tree.parents for tree in trees)
    return VerifyRows(torch.from_numpy(tokens), *_batch(shapes, width))


def moves(accepted: Sequence[tuple[int, ...]], width: int) -> tuple[list[int], list[int]]:
    """Rows whose keys and values do not lie where the committed text wants them.

    Args:
        accepted: per sequence the accepted nodes, from the root's child downwards.
        width: W.

    Returns:
        Rows of the flat batch to read, and those to write. A row that is written is read by none
        behind it in the list, so they may be moved in order as well as all at once.
    """
    sources: list[int] = []
    destinations: list[int] = []
    for index, nodes in enumerate(accepted):
        for place, node in enumerate(nodes):
            if node != place:
                sources.append(index * width + 1 + node)
                destinations.append(index * width + 1 + place)
    return sources, destinations


@lru_cache(maxsize=_MAX_BATCHES)
def _batch(shapes: tuple[tuple[int, ...], ...], width: int) -> tuple[Tensor, ...]:
    """``VerifyRows`` but its tokens."""
    parts = zip(*(_shape(parents, width) for parents in shapes), strict=True)
    return tuple(torch.from_numpy(np.stack(part)) for part in parts)


@lru_cache(maxsize=_MAX_SHAPES)
def _shape(parents: tuple[int, ...], width: int) -> tuple[NDArray[Any], ...]:
    """A sequence's part of it."""
    depths = np.ones(width, dtype=np.int64)
    depths[0] = 0
    sees = np.eye(width, dtype=bool)
    sees[:, 0] = True
    first_child = np.full(width, _NOBODY, dtype=np.int64)
    next_sibling = np.full(width, _NOBODY, dtype=np.int64)
    youngest: dict[int, int] = {}
    for row, parent in enumerate((node + 1 for node in parents), start=1):
        depths[row] = depths[parent] + 1
        sees[row] |= sees[parent]
        links = next_sibling if parent in youngest else first_child
        links[youngest.get(parent, parent)] = row
        youngest[parent] = row
    return depths, sees, first_child, next_sibling
