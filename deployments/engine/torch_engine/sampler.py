"""Chooses the next token of every sampled row. The only place where text is decided.

A row's choice is a function of its logits, the tokens before it and the request's seed: not of the
batch it is computed in, nor of the draft that made it a row of this batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from deployments.engine.speculation.noise import row_key
from deployments.engine.torch_engine.bad_words import banned_tokens
from deployments.engine.torch_engine.drawing import draw
from deployments.engine.torch_engine.sampling_math import process_logits
from deployments.engine.torch_engine.structure.mask import forbid

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from torch import Tensor

    from deployments.engine.torch_engine.sequence import Sequence

INVALID_TOKEN = -1
"""The choice of a row whose logits are not numbers."""

NO_TOKEN = -2
"""The choice of a row whose every token is banned or does not fit the output's structure."""

_ROWS_AT_ONCE = 16
"""Bounds the float64 temporaries of sampled rows."""


class SampleRow(NamedTuple):
    """One position to choose a token for.

    Attributes:
        path: draft tokens between the sequence's committed text and this position.
    """

    sequence: Sequence
    path: tuple[int, ...] = ()


def sample(logits_MV: Tensor, rows: SequenceOf[SampleRow]) -> list[int]:
    """Choose one token per row.

    Args:
        logits_MV: [M, V] float32, raw.
        rows: M rows, in the order of the logits.

    Returns:
        M token ids; ``INVALID_TOKEN`` where a row holds NaN, or no finite maximum; ``NO_TOKEN``
        where nothing may be chosen. Those of rows behind a draft token that was not chosen may be
        any: no text gets that far.
    """
    if not rows:
        return []
    # The maximum of a row with a NaN is NaN, so one pass both picks greedily and checks.
    best_M, token_M = logits_MV.max(dim=1)
    choices: list[int] = token_M.tolist()
    is_valid: list[bool] = torch.isfinite(best_M).tolist()
    slow = [
        index
        for index, row in enumerate(rows)
        if is_valid[index] and (not row.sequence.sampling.is_greedy or _is_adjusted(row))
    ]
    # Behind a draft token that is not chosen nothing will be: on a CPU such rows are left out. A
    # GPU chooses for all rows at once sooner than for some of them first.
    wave: list[int] = []
    waiting: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index in slow:
        sequence, path = rows[index]
        can_wait = path and not sequence.sampling.is_greedy and logits_MV.device.type == "cpu"
        # Siblings may carry the same token.
        (waiting.setdefault((id(sequence), path), []) if can_wait else wave).append(index)
    while wave:
        for start in range(0, len(wave), _ROWS_AT_ONCE):
            part = wave[start : start + _ROWS_AT_ONCE]
            for index, token in zip(part, _sample_slow(logits_MV, rows, part), strict=True):
                choices[index] = token
        reached = {
            (id(rows[index].sequence), (*rows[index].path, choices[index])) for index in wave
        }
        wave = [index for key in reached for index in waiting.get(key, ())]
    return [
        token if valid else INVALID_TOKEN for token, valid in zip(choices, is_valid, strict=True)
    ]


def _sample_slow(logits_MV: Tensor, rows: SequenceOf[SampleRow], indices: list[int]) -> list[int]:
    tokens = dict.fromkeys(indices, NO_TOKEN)
    plain = [index for index in indices if _is_plainly_drawn(rows[index])]
    if plain:
        drawn = draw(
            logits_MV[plain],
            [_noise_key(rows[index]) for index in plain],
            [rows[index].sequence.sampling.temperature for index in plain],
        )
        tokens |= zip(plain, drawn, strict=True)
    others = [index for index in indices if index not in plain]
    if others:
        tokens |= zip(others, _sample_adjusted(logits_MV, rows, others), strict=True)
    return list(tokens.values())


def _sample_adjusted(
    logits_MV: Tensor, rows: SequenceOf[SampleRow], indices: list[int]
) -> list[int]:
    chosen = [rows[index] for index in indices]
    scores_RV = logits_MV[indices].to(torch.float64)
    adjusted = [at for at, row in enumerate(chosen) if _is_adjusted(row)]
    if not adjusted:
        return _choose(scores_RV, chosen)
    for at in adjusted:
        scores_RV[at] = _adjust(scores_RV[at], chosen[at])
    forbid(scores_RV, [(row.sequence.structure, row.path) for row in chosen])
    is_open = (scores_RV.max(dim=1).values > -torch.inf).tolist()
    if all(is_open):
        return _choose(scores_RV, chosen)
    # Filters cannot do with a row that has nothing to choose from.
    opened = [at for at, has_tokens in enumerate(is_open) if has_tokens]
    tokens = [NO_TOKEN] * len(chosen)
    if opened:
        found = _choose(scores_RV[opened], [chosen[at] for at in opened])
        for at, token in zip(opened, found, strict=True):
            tokens[at] = token
    return tokens


def _choose(scores_RV: Tensor, rows: SequenceOf[SampleRow]) -> list[int]:
    settings = [row.sequence.sampling for row in rows]
    scores_RV = process_logits(
        scores_RV,
        [sampling.temperature for sampling in settings],
        [sampling.top_k for sampling in settings],
        [sampling.top_p for sampling in settings],
        [sampling.min_p for sampling in settings],
    )
    best_R, token_R = scores_RV.max(dim=1)
    is_valid = torch.isfinite(best_R).tolist()
    tokens: list[int] = token_R.tolist()
    drawn = [at for at, sampling in enumerate(settings) if is_valid[at] and not sampling.is_greedy]
    if drawn:
        keys = [_noise_key(rows[at]) for at in drawn]
        for at, token in zip(drawn, draw(scores_RV[drawn], keys), strict=True):
            tokens[at] = token
    return [
        token if valid else INVALID_TOKEN for token, valid in zip(tokens, is_valid, strict=True)
    ]


def _noise_key(row: SampleRow) -> int:
    position = len(row.sequence.token_ids) + len(row.path)
    return row_key(row.sequence.sampling.seed, row.sequence.request.choice_index, position)


def _must_go_on(row: SampleRow) -> bool:
    """Whether ``min_tokens`` forbids a stop token at this position."""
    sequence = row.sequence
    num_output_tokens = sequence.num_output_tokens + len(row.path)
    # A stop token here would be output token number num_output_tokens + 1.
    return num_output_tokens < sequence.stop.min_tokens and bool(sequence.stop.stop_token_ids)


def _banned(row: SampleRow) -> list[int]:
    sequence = row.sequence
    banned: list[int] = []
    bad = sequence.sampling.bad_token_sequences
    if bad:
        output = sequence.output_tail(max(map(len, bad)) - 1)
        banned += banned_tokens(bad, output, row.path)
    if _must_go_on(row):
        banned += sequence.stop.stop_token_ids
    return banned


def _is_adjusted(row: SampleRow) -> bool:
    sequence = row.sequence
    sampling = sequence.sampling
    return (
        bool(sampling.logit_bias or sampling.bad_token_sequences)
        or sequence.penalties is not None
        or sequence.structure is not None
        or _must_go_on(row)
    )


def _is_plainly_drawn(row: SampleRow) -> bool:
    """Whether logits over the temperature are the scores."""
    sampling = row.sequence.sampling
    is_filtered = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    return not (sampling.is_greedy or is_filtered or _is_adjusted(row))


def _adjust(logits_V: Tensor, row: SampleRow) -> Tensor:
    """Bias, then penalties, then what is banned; [V] float64 in and out."""
    sequence = row.sequence
    bias = sequence.sampling.logit_bias
    if bias:
        # index_add_ sums the biases of a token named twice, on every device alike.
        ids = torch.tensor([token for token, _ in bias], device=logits_V.device)
        values = torch.tensor([value for _, value in bias], dtype=torch.float64)
        logits_V = logits_V.index_add(0, ids, values.to(logits_V.device))
    if sequence.penalties is not None:
        logits_V = sequence.penalties.apply(logits_V, row.path)
    banned = _banned(row)
    if banned:
        ids = torch.tensor(banned, device=logits_V.device)
        logits_V = logits_V.index_fill(0, ids, -torch.inf)
    return logits_V
