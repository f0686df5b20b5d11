"""A drafter's choices, coupled to the target's by the noise both add.

R: rows, V: vocabulary, S: sampled rows, C: candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.speculation.noise import gumbel, row_key
from deployments.engine.torch_engine.sampling_math import process_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from deployments.engine.speculation.types import DraftSampling

_NOISY_CANDIDATES = 128
"""Noise is drawn for this many of the likeliest tokens of a row: a far token that would win by
noise alone is worth less than the time to look at the whole vocabulary."""


class Choice(NamedTuple):
    """A guess, and how likely the drafter's own scores make it."""

    token_id: int
    log_chance: float


def coupled_scores(
    logits_RV: Tensor,
    samplings: Sequence[DraftSampling],
    positions: Sequence[int],
    token_ids: Tensor | None = None,
) -> Tensor:
    """The scores whose argmax is the guess: processed, with the target's noise where it samples.

    Args:
        logits_RV: float32.
        samplings: R requests' settings.
        positions: R indices of the tokens being chosen, from the first prompt token.
        token_ids: [V] of the columns, where these are a draft vocabulary.

    Returns:
        [R, V]; tokens that cannot or will hardly win are ``-inf``.
    """
    scores_RV, rows = _processed_scores(logits_RV, samplings)
    if rows:
        noisy_SC, columns_SC = _noisy_candidates(scores_RV, rows, samplings, positions, token_ids)
        scores_RV = scores_RV.to(torch.float64, copy=True)
        nothing_SV = torch.full_like(scores_RV[rows], -torch.inf)
        scores_RV[rows] = nothing_SV.scatter_(1, columns_SC, noisy_SC)
    return scores_RV


def coupled_choices(
    logits_RV: Tensor,
    samplings: Sequence[DraftSampling],
    positions: Sequence[int],
    token_ids: Tensor | None = None,
) -> list[Choice]:
    """The argmax of ``coupled_scores``, without spreading the noise over the vocabulary.

    Args:
        logits_RV: as there.
        samplings: as there.
        positions: as there.
        token_ids: as there.
    """
    scores_RV, rows = _processed_scores(logits_RV, samplings)
    best_R, columns_R = scores_RV.max(dim=1)
    log_chances_R = best_R - scores_RV.logsumexp(dim=1)
    if rows:
        noisy_SC, columns_SC = _noisy_candidates(scores_RV, rows, samplings, positions, token_ids)
        best_S, places_S = noisy_SC.max(dim=1)
        columns_R[rows] = columns_SC.gather(1, places_S.unsqueeze(1)).squeeze(1)
        log_chances_R[rows] = (best_S - noisy_SC.logsumexp(dim=1)).to(log_chances_R.dtype)
    ids_R = columns_R if token_ids is None else token_ids[columns_R]
    return [*map(Choice, ids_R.tolist(), log_chances_R.tolist())]


def _processed_scores(
    logits_RV: Tensor, samplings: Sequence[DraftSampling]
) -> tuple[Tensor, list[int]]:
    """Filtered scores, and the rows that are sampled."""
    scores_RV = process_logits(
        logits_RV,
        [sampling.temperature for sampling in samplings],
        [sampling.top_k for sampling in samplings],
        [sampling.top_p for sampling in samplings],
        [sampling.min_p for sampling in samplings],
    )
    return scores_RV, [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]


def _noisy_candidates(
    scores_RV: Tensor,
    rows: Sequence[int],
    samplings: Sequence[DraftSampling],
    positions: Sequence[int],
    token_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores with noise of the likeliest tokens of the sampled rows, and their columns: [S, C]."""
    keys = [row_key(samplings[r].seed, samplings[r].choice_index, positions[r]) for r in rows]
    num_candidates = min(_NOISY_CANDIDATES, scores_RV.shape[1])
    likeliest = scores_RV[rows].topk(num_candidates, dim=1)
    ids_SC = likeliest.indices if token_ids is None else token_ids[likeliest.indices]
    return likeliest.values + gumbel(keys, ids_SC), likeliest.indices
