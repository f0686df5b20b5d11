"""The trees that evaluations verify: at every depth the same number of guesses behind each node."""

from __future__ import annotations

from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence


class TreeShape(NamedTuple):
    """A tree by its guesses; a chain is the tree with one guess at every depth.

    Attributes:
        widths: entry j is how many of its likeliest tokens the draft puts behind each node at depth
            j, the last committed token being depth 0.
    """

    widths: tuple[int, ...]

    @classmethod
    def chain(cls, length: int) -> TreeShape:
        """A tree without branches."""
        return cls((1,) * length)

    @property
    def depth(self) -> int:
        """Tokens that it may give, the bonus token not counted."""
        return len(self.widths)

    @property
    def nodes_at(self) -> tuple[int, ...]:
        """Nodes by their depth, from 1."""
        return tuple(accumulate(self.widths, mul))

    @property
    def num_nodes(self) -> int:
        """Draft tokens that the target verifies at once."""
        return sum(self.nodes_at)

    @property
    def extended_at(self) -> tuple[int, ...]:
        """Rows of each of the draft's steps: the last committed token, then what it guessed."""
        return (1, *self.nodes_at[:-1])[: self.depth]

    def describe(self) -> str:
        """In words, such as ``10 nodes, 2-4-4 by depth``."""
        return f"{self.num_nodes} nodes, {'-'.join(map(str, self.nodes_at))} by depth"

    def parents(self) -> Sequence[int]:
        """As ``DraftTree.parents``, depth by depth, the likeliest child first."""
        parents: list[int] = []
        above = [-1]
        for width in self.widths:
            start = len(parents)
            parents += [node for node in above for _ in range(width)]
            above = list(range(start, len(parents)))
        return parents
