"""Rounds of speculation where several processes share the layers of one target.

Every rank runs SGLang's scheduler over the same batches. The first one drafts: it tells the others
what to verify, and what it chose. They would choose the same tokens themselves, as long as they
computed the same logits to the bit; ranks that disagree once wait for each other for ever.

Both messages go between ranks that meet in every layer of the step anyway. Nobody waits for a draft
replica.

B: sequences, N: nodes of a draft at most.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import torch

from deployments.engine.sglang_engine.draft_rounds import commit
from deployments.engine.speculation.types import DraftTree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from deployments.engine.sglang_engine.draft_rounds import Committed, DraftRounds, Running

    Share = Callable[[Tensor], object]
    """Puts the first rank's values into every rank's tensor; all ranks call it together."""


class Rounds(Protocol):
    """What a rank's worker drives, see ``DraftRounds``."""

    def begin(self, batch: Sequence[Running]) -> list[DraftTree]:
        """What to verify for each sequence."""

    def announce(self) -> None:
        """Tell the pool about it."""

    def end(self, choices: Sequence[Sequence[int]]) -> list[Committed]:
        """What became of it."""

    def leave(self, rid: str) -> None:
        """A sequence ended."""


class LeadingRounds:
    """The first rank's.

    Args:
        rounds: its own.
        share: see ``Share``.
        max_nodes: N.
    """

    def __init__(self, rounds: DraftRounds, share: Share, max_nodes: int) -> None:
        self._rounds = rounds
        self._share = share
        self._max_nodes = max_nodes

    def begin(self, batch: Sequence[Running]) -> list[DraftTree]:
        """See ``Rounds.begin``."""
        trees = self._rounds.begin(batch)
        self._share(_trees_to_tensor(trees, self._max_nodes))
        return trees

    def announce(self) -> None:
        """See ``Rounds.announce``."""
        self._rounds.announce()

    def end(self, choices: Sequence[Sequence[int]]) -> list[Committed]:
        """See ``Rounds.end``."""
        self._share(torch.tensor([choice for own in choices for choice in own], dtype=torch.int64))
        return self._rounds.end(choices)

    def leave(self, rid: str) -> None:
        """See ``Rounds.leave``."""
        self._rounds.leave(rid)


class FollowingRounds:
    """Those of all other ranks, which do as the first one does.

    Args:
        share: see ``Share``.
        max_nodes: N.
    """

    def __init__(self, share: Share, max_nodes: int) -> None:
        self._share = share
        self._max_nodes = max_nodes
        self._trees: list[DraftTree] = []

    def begin(self, batch: Sequence[Running]) -> list[DraftTree]:
        """See ``Rounds.begin``."""
        told = torch.empty(len(batch), 1 + 2 * self._max_nodes, dtype=torch.int64)
        self._share(told)
        self._trees = _trees_from_tensor(told)
        return self._trees

    def announce(self) -> None:
        """The first rank does."""

    def end(self, choices: Sequence[Sequence[int]]) -> list[Committed]:
        """See ``Rounds.end``; what this rank chose itself is not used."""
        del choices
        told = torch.empty(sum(len(tree) + 1 for tree in self._trees), dtype=torch.int64)
        self._share(told)
        flat, bounds = told.tolist(), [0]
        for tree in self._trees:
            bounds.append(bounds[-1] + len(tree) + 1)
        return [
            commit(tree, flat[start:end])
            for tree, (start, end) in zip(self._trees, pairwise(bounds), strict=True)
        ]

    def leave(self, rid: str) -> None:
        """Nothing is kept of a sequence."""


def _trees_to_tensor(trees: Sequence[DraftTree], max_nodes: int) -> Tensor:
    """[B, 1 + 2 N] int64: nodes, their tokens, their parents."""
    told = torch.zeros(len(trees), 1 + 2 * max_nodes, dtype=torch.int64)
    for row, tree in zip(told, trees, strict=True):
        size = len(tree)
        row[0] = size
        if size:
            row[1 : 1 + size] = torch.tensor(tree.token_ids)
            row[1 + max_nodes : 1 + max_nodes + size] = torch.tensor(tree.parents)
    return told


def _trees_from_tensor(told: Tensor) -> list[DraftTree]:
    max_nodes = told.shape[1] // 2
    trees = []
    for size, *values in told.tolist():
        tokens, parents = values[:size], values[max_nodes : max_nodes + size]
        trees.append(DraftTree(tuple(tokens), tuple(parents)))
    return trees
