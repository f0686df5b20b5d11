"""A drafter's work on one query: the draft in flight, its likely outcomes and what follows them.

In a forward, every row of a guess sees the text, its node's path in the draft in flight, and the
chain it ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from deployments.engine.speculation.types import DraftQuery, DraftTree
    from deployments.engine.torch_engine.draft_sessions import SessionCache


@dataclass(slots=True)
class Branch:
    """One outcome and the chain behind it.

    Attributes:
        position: index of the bonus token in the text.
        log_likelihood: that all of it comes true, by the model's own scores.
        log_chances: of each token, that it is right if all before it are.
        token_ids: the bonus token, then the draft.
    """

    node: int
    position: int
    log_likelihood: float
    log_chances: list[float]
    token_ids: list[int]

    def extend(self, token_id: int, log_chance: float) -> None:
        """Put a token behind it."""
        self.token_ids.append(token_id)
        self.log_chances.append(log_chance)
        self.log_likelihood += log_chance


@dataclass(slots=True, kw_only=True)
class Round:
    """One query at work.

    Attributes:
        index: the query's place in the call.
        depths: tokens between the committed text and behind each node; 0 for the text itself.
        ancestors: [n + 1, n] bool, the draft nodes seen from the text (row 0) and from each node.
        scratch: slots of guesses; the first n belong to the draft in flight.
        owners: of the other slots in use, the index of the branch whose token is there.
    """

    index: int
    query: DraftQuery
    cache: SessionCache
    fanout: int
    num_draft_tokens: int
    depths: list[int]
    ancestors: Tensor
    scratch: Tensor
    branches: list[Branch] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)

    def branches_to_extend(self, step: int, least_log_chance: float) -> list[int]:
        """Those of so many draft tokens whose next one may well be reached."""
        if step >= self.num_draft_tokens:
            return []
        return [
            index
            for index, branch in enumerate(self.branches)
            if len(branch.token_ids) == step + 1 and branch.log_likelihood >= least_log_chance
        ]


@dataclass(frozen=True, slots=True)
class Part:
    """One session's share of a forward; its new rows lie in the last slots of ``kv_slots``."""

    token_ids: Sequence[int]
    positions: Sequence[int]
    kv_slots: Tensor
    tail_mask: Tensor | None = None
    num_logits: int = 0


def branch_part(work: Round, indices: Sequence[int]) -> Part:
    """The newest token of some branches, seeing the text, its node's path and its own chain."""
    num_nodes = len(work.query.in_flight)
    work.owners += indices
    branches = [work.branches[index] for index in indices]
    paths = work.ancestors[[branch.node + 1 for branch in branches]]
    own = torch.tensor(indices).unsqueeze(1) == torch.tensor(work.owners)
    used = work.scratch[: num_nodes + len(work.owners)]
    return Part(
        [branch.token_ids[-1] for branch in branches],
        [branch.position + len(branch.token_ids) - 1 for branch in branches],
        torch.cat((work.cache.slots[: len(work.query.token_ids)], used)),
        torch.cat((paths, own), dim=1),
        num_logits=len(branches),
    )


def shed(query: DraftQuery, room: int | None) -> tuple[int, int] | None:
    """The (F, k) asked for, or as much of it as ``room`` rows allow: F gives way first."""
    fanout, num_draft_tokens, num_nodes = query.fanout, query.num_draft_tokens, len(query.in_flight)
    while room is not None and rows_needed(num_nodes, fanout, num_draft_tokens) > room:
        if fanout > 1:
            fanout -= 1
        elif num_draft_tokens > 0:
            num_draft_tokens -= 1
        else:
            return None
    return fanout, num_draft_tokens


def rows_needed(num_nodes: int, fanout: int, num_draft_tokens: int) -> int:
    """Scratch rows of one query; the last token of a draft is never read, the bonus token is."""
    return num_nodes + (num_nodes + 1) * fanout * num_draft_tokens


def depths_of(tree: DraftTree) -> list[int]:
    """Tokens between the committed text and behind each node; first 0, for the text itself."""
    depths = [0]
    for parent in tree.parents:
        depths.append(depths[parent + 1] + 1)
    return depths


def ancestors_of(tree: DraftTree) -> Tensor:
    """[n + 1, n] bool, the nodes seen from the text (row 0) and from each node."""
    ancestors = torch.zeros(len(tree) + 1, len(tree), dtype=torch.bool)
    for node, parent in enumerate(tree.parents):
        ancestors[node + 1] = ancestors[parent + 1]
        ancestors[node + 1, node] = True
    return ancestors
