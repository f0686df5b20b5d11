"""How likely the model found tokens: the log-softmax of its raw logits.

Raw means before biases, penalties, temperature and filters, which say how a token is chosen and not
what the model thinks of it. An output token is scored by the very row it was chosen from, which
under speculation is a row of the verified draft; a prompt token by the row before it.

M, R: rows, V: vocabulary, K: alternatives.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.errors import InvalidLogitsError
from deployments.engine.types import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from torch import Tensor

    from deployments.engine.torch_engine.rounds import Outcome
    from deployments.engine.torch_engine.sequence import Sequence
    from deployments.engine.types import GenerationRequest

_ROWS_AT_ONCE = 16
"""Bounds the float64 temporaries."""


class PromptRow(NamedTuple):
    """One prompt token to score.

    Attributes:
        position: of the token in its prompt, from 1 on.
    """

    sequence: Sequence
    position: int


class ScoredToken(NamedTuple):
    """One token to score.

    Attributes:
        row: the logits it is scored by.
        num_top: likeliest tokens to tell beside it; all there are, if that is fewer.
    """

    row: int
    token_id: int
    num_top: int


def wants_prompt_logprobs(request: GenerationRequest) -> bool:
    """Whether the prompt is to be scored; with resumed output that has been delivered."""
    return request.sampling.num_prompt_logprobs is not None and not request.resumed_output_ids


def score(logits_MV: Tensor, tokens: SequenceOf[ScoredToken]) -> list[TokenLogprob]:
    """Score tokens, a few rows at a time.

    Args:
        logits_MV: float32, raw.
        tokens: in any order; a row may be used more than once.

    Returns:
        One per token, NaN where its row holds NaN or infinity.
    """
    scored: list[TokenLogprob] = []
    for start in range(0, len(tokens), _ROWS_AT_ONCE):
        part = tokens[start : start + _ROWS_AT_ONCE]
        logits_RV = logits_MV[[token.row for token in part]].to(torch.float64)
        own_R1 = logits_RV.gather(
            1, torch.tensor([[token.token_id] for token in part], device=logits_MV.device)
        )
        total_R1 = logits_RV.logsumexp(dim=1, keepdim=True)
        ranks: list[int] = ((logits_RV > own_R1).sum(dim=1) + 1).tolist()
        logprobs: list[float] = (own_R1 - total_R1).squeeze(1).tolist()
        num_top = min(max(token.num_top for token in part), logits_RV.shape[1])
        best_RK = logits_RV.topk(num_top, dim=1)
        top_ids: list[list[int]] = best_RK.indices.tolist()
        top_logprobs: list[list[float]] = (best_RK.values - total_R1).tolist()
        scored += [
            TokenLogprob(
                token.token_id,
                logprobs[at],
                ranks[at],
                tuple(zip(top_ids[at], top_logprobs[at], strict=True))[: token.num_top],
            )
            for at, token in enumerate(part)
        ]
    return scored


def score_prompts(logits_MV: Tensor, rows: SequenceOf[PromptRow]) -> None:
    """Append to their sequences the log probabilities of the prompt tokens of one step.

    Args:
        logits_MV: float32, raw, one row per prompt token.
        rows: in the order of the logits; a sequence's positions go on where it stopped.
    """
    tokens = [
        ScoredToken(row, sequence.token_ids[position], sequence.sampling.num_prompt_logprobs or 0)
        for row, (sequence, position) in enumerate(rows)
    ]
    for (sequence, _), scored in zip(rows, score(logits_MV, tokens), strict=True):
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs.append(scored)


def output_logprobs(
    logits_MV: Tensor, outcomes: SequenceOf[Outcome]
) -> list[tuple[TokenLogprob, ...]]:
    """Log probabilities of what a step commits.

    Args:
        logits_MV: float32, raw, every row of the step.
        outcomes: whose rows they are.

    Returns:
        Per outcome one per new token; none where they were not asked for.
    """
    wanted = [outcome.sequence.sampling.num_logprobs for outcome in outcomes]
    tokens = [
        ScoredToken(row, token_id, num_top)
        for outcome, num_top in zip(outcomes, wanted, strict=True)
        if num_top is not None
        for row, token_id in zip(outcome.rows, outcome.new_token_ids, strict=True)
    ]
    scored = iter(score(logits_MV, tokens))
    return [
        () if num_top is None else tuple(islice(scored, len(outcome.new_token_ids)))
        for outcome, num_top in zip(outcomes, wanted, strict=True)
    ]


def invalid_logits(
    logprobs: SequenceOf[TokenLogprob | None] | None,
) -> InvalidLogitsError | None:
    """The error of a model whose logits are not numbers, for then no log probability is one."""
    if any(entry is not None and math.isnan(entry.logprob) for entry in logprobs or ()):
        return InvalidLogitsError("The model gave logits that are not numbers.")
    return None
