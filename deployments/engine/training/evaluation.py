"""How well a draft guesses, counted on texts that it was not trained on.

A chain counts up to its first wrong token, and until there the draft is fed with what it drafted
itself; so the unrolled steps give a greedy chain's acceptance exactly, without drafting. A tree is
followed along the target's tokens, too: what it drafts beside them is never accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deployments.engine.training.batches import collate
from deployments.engine.training.training_time_test import unroll
from deployments.engine.training.tree_shape import TreeShape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from deployments.engine.training.batches import FeatureText
    from deployments.engine.training.draft_module import DraftModule

_NO_TREE = TreeShape(())


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftQuality:
    """Acceptance on held-out answers, greedy.

    Attributes:
        acceptance: entry j is the share of right tokens at position j + 1 of a chain, of the chains
            that were right so far.
        mean_acceptance_length: entry K - 1 is what a round with K draft tokens commits, the bonus
            token included (tau): rounds one behind the other over each answer.
        tree_acceptance_length: the same of rounds with a tree.
        coverage: share of the answers' tokens that can be drafted at all.
        num_positions: where a chain began.
    """

    acceptance: tuple[float, ...]
    mean_acceptance_length: tuple[float, ...]
    tree_acceptance_length: float
    coverage: float
    num_positions: int


@torch.no_grad()
def evaluate(
    draft: DraftModule,
    embedding_VE: Tensor,
    texts: Iterable[FeatureText],
    num_draft_tokens: int,
    tree: TreeShape = _NO_TREE,
) -> DraftQuality:
    """Draft behind every position of every answer.

    Args:
        draft: its mode is left as it is; nothing in it depends on it.
        embedding_VE: the target's.
        texts: held out; answers should be the target's greedy ones.
        num_draft_tokens: length of the chains.
        tree: verified in place of a chain; without one, a round commits its bonus token alone.
    """
    num_steps = max(num_draft_tokens, tree.depth)
    tried = torch.zeros(num_steps, dtype=torch.int64)
    right = torch.zeros(num_steps, dtype=torch.int64)
    chains = [_Rounds(index + 1) for index in range(num_draft_tokens)]
    tree_rounds = _Rounds(tree.depth)
    widths = torch.ones(num_steps, dtype=torch.int64)
    widths[: tree.depth] = torch.tensor(tree.widths, dtype=torch.int64)
    num_guesses = min(int(widths.max()), len(draft.draft_token_ids))
    num_tokens = num_covered = 0
    for text in texts:
        batch = collate([text], embedding_VE.device, torch.float32)
        length = torch.zeros(text.num_tokens, dtype=torch.int64)
        tree_length = torch.zeros_like(length)
        is_alive = torch.ones(text.num_tokens, dtype=torch.bool)
        is_tree_alive = is_alive
        for step, drafted in enumerate(unroll(draft, embedding_VE, batch, num_steps)):
            likeliest = draft.logits(drafted.hidden[0]).topk(num_guesses).indices
            tokens = draft.draft_token_ids[likeliest]
            is_right = (tokens == drafted.wanted[0].unsqueeze(1)).cpu()
            is_answer = drafted.is_answer[0].cpu()
            is_asked = is_alive & is_answer
            is_alive = is_asked & is_right[:, 0]
            tried[step] += is_asked.sum()
            right[step] += is_alive.sum()
            length += is_alive
            if step < tree.depth:
                is_tree_alive = is_tree_alive & is_answer & is_right[:, : widths[step]].any(1)
                tree_length += is_tree_alive
        answers = text.is_answer.nonzero().flatten()
        wanted = text.wanted[answers].long()
        num_tokens += len(wanted)
        num_covered += int(draft.get_buffer("t2d").cpu()[wanted].sum())
        first, last = int(answers[0]), int(answers[-1])
        for chain in chains:
            chain.replay(length.tolist(), first, last)
        tree_rounds.replay(tree_length.tolist(), first, last)
    return DraftQuality(
        acceptance=tuple((right / tried.clamp(min=1)).tolist()[:num_draft_tokens]),
        mean_acceptance_length=tuple(chain.mean_length for chain in chains),
        tree_acceptance_length=tree_rounds.mean_length,
        coverage=num_covered / max(num_tokens, 1),
        num_positions=int(tried[0]),
    )


class _Rounds:
    """Rounds of drafts of one shape, one behind the other over each answer.

    Args:
        longest: draft tokens that a round may accept.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._num_rounds = self._num_committed = 0

    @property
    def mean_length(self) -> float:
        """Tokens a round committed, its bonus token included."""
        return self._num_committed / max(self._num_rounds, 1)

    def replay(self, accepted: Sequence[int], first: int, last: int) -> None:
        """Count the rounds of one answer.

        Args:
            accepted: draft tokens that a draft behind each position would have got right.
            first: row that stands before the answer's first token.
            last: row that stands before its last one.
        """
        at = first
        while at < last:
            # The row's own next token is the bonus of the round before.
            gained = min(accepted[at], self._longest) + 1
            self._num_rounds += 1
            self._num_committed += gained
            at += gained
