"""Which part of a verified draft becomes text: a pure function.

The target's own sampler has chosen a token behind every node of the draft (and behind the last
committed token). The text follows the target's choices as long as the draft foresaw them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import DraftTree


class Acceptance(NamedTuple):
    """The outcome of one verification.

    Attributes:
        nodes: accepted draft nodes, from the root's child downwards.
        bonus_token_id: the target's choice behind the last accepted node.
    """

    nodes: tuple[int, ...]
    bonus_token_id: int


def accept(tree: DraftTree, choices: Sequence[int]) -> Acceptance:
    """Walk from the root along the target's choices.

    Args:
        tree: the draft; siblings carry distinct tokens.
        choices: the target's token behind the root (index 0) and behind node i (index i + 1).

    Returns:
        The accepted path and the bonus token; ``len(nodes) + 1`` tokens are committed.
    """
    child_of = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(tree.parents, tree.token_ids, strict=True))
    }
    nodes: list[int] = []
    at = -1
    while (child := child_of.get((at, choices[at + 1]))) is not None:
        nodes.append(child)
        at = child
    return Acceptance(tuple(nodes), choices[at + 1])
