"""How well a draft guesses, counted on texts that it was not trained on.

A chain counts up to its first wrong token, and until there the draft is fed with what it drafted
itself; so the unrolled steps give a greedy chain's acceptance exactly, without drafting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deployments.engine.training.batches import collate
from deployments.engine.training.training_time_test import unroll

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from deployments.engine.training.batches import FeatureText
    from deployments.engine.training.draft_module import DraftModule


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftQuality:
    """Acceptance on held-out answers, greedy.

    Attributes:
        acceptance: entry j is the share of right tokens at position j + 1 of a chain, of the chains
            that were right so far.
        mean_acceptance_length: entry K - 1 is what a round with K draft tokens commits, the bonus
            token included (tau): rounds one behind the other over each answer.
        coverage: share of the answers' tokens that can be drafted at all.
        num_positions: where a chain began.
    """

    acceptance: tuple[float, ...]
    mean_acceptance_length: tuple[float, ...]
    coverage: float
    num_positions: int


@torch.no_grad()
def evaluate(
    draft: DraftModule, embedding_VE: Tensor, texts: Iterable[FeatureText], num_draft_tokens: int
) -> DraftQuality:
    """Draft behind every position of every answer.

    Args:
        draft: its mode is left as it is; nothing in it depends on it.
        embedding_VE: the target's.
        texts: held out; answers should be the target's greedy ones.
        num_draft_tokens: length of the chains.
    """
    tried = torch.zeros(num_draft_tokens, dtype=torch.int64)
    right = torch.zeros(num_draft_tokens, dtype=torch.int64)
    rounds, committed = [0] * num_draft_tokens, [0] * num_draft_tokens
    num_tokens = num_covered = 0
    for text in texts:
        batch = collate([text], embedding_VE.device, torch.float32)
        length = torch.zeros(text.num_tokens, dtype=torch.int64)
        is_alive = torch.ones(text.num_tokens, dtype=torch.bool)
        for step, drafted in enumerate(unroll(draft, embedding_VE, batch, num_draft_tokens)):
            tokens = draft.draft_token_ids[draft.logits(drafted.hidden[0]).argmax(-1)]
            is_asked = is_alive & drafted.is_answer[0].cpu()
            is_alive = is_asked & (tokens == drafted.wanted[0]).cpu()
            tried[step] += is_asked.sum()
            right[step] += is_alive.sum()
            length += is_alive
        answers = text.is_answer.nonzero().flatten()
        wanted = text.wanted[answers].long()
        num_tokens += len(wanted)
        num_covered += int(draft.get_buffer("t2d").cpu()[wanted].sum())
        _replay(length.tolist(), int(answers[0]), int(answers[-1]), rounds, committed)
    return DraftQuality(
        acceptance=tuple((right / tried.clamp(min=1)).tolist()),
        mean_acceptance_length=tuple(
            total / max(count, 1) for total, count in zip(committed, rounds, strict=True)
        ),
        coverage=num_covered / max(num_tokens, 1),
        num_positions=int(tried[0]),
    )


def _replay(
    accepted: list[int], first: int, last: int, rounds: list[int], committed: list[int]
) -> None:
    """Count the rounds of one answer for every chain length.

    Args:
        accepted: draft tokens a chain behind each position would have got right.
        first: row that stands before the answer's first token.
        last: row that stands before its last one.
        rounds: of each chain length; added to.
        committed: tokens of those rounds; added to.
    """
    for index in range(len(rounds)):
        at = first
        while at < last:
            # The row's own next token is the bonus of the round before.
            gained = min(accepted[at], index + 1) + 1
            rounds[index] += 1
            committed[index] += gained
            at += gained
