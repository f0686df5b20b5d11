"""What SGLang says of a generation, in the seam's words.

An answer is one item of ``sglang.Engine.async_generate``: new tokens and what is known about them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deployments.engine.errors import (
    EngineError,
    EngineOverloadedError,
    RequestRejectedError,
)
from deployments.engine.sglang_engine.draft_rounds import RoundCounts
from deployments.engine.sglang_engine.own_params import CUSTOM_PARAMS_KEY
from deployments.engine.types import FinishReason, SpeculationStats, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deployments.engine.types import GenerationRequest

_BAD_REQUEST = 400
_UNAVAILABLE = 503
_MAX_MESSAGE_CHARS = 300
_UNKNOWN_RANK = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """New tokens of one request.

    Attributes:
        finish: set on the last answer.
        match: the token that SGLang ended the output at, if that was why.
        num_cached: tokens of the input whose rows were cached.
        num_tier_cached: those of them that came from a KV tier.
        num_preemptions: times the request had to give its rows back, so far.
        rounds: what verification did in the steps that gave these tokens, if there was any.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish: FinishReason | None
    match: int | None
    num_cached: int
    num_tier_cached: int
    num_preemptions: int
    rounds: tuple[RoundCounts, ...] = ()


def read_answer(
    item: Mapping[str, Any], request: GenerationRequest, *, with_prompt: bool = True
) -> Answer:
    """Read one item.

    Args:
        item: ``output_ids`` and ``meta_info``.
        request: what it answers.
        with_prompt: whether to read log probabilities of the prompt, if they were asked for.

    Raises:
        RequestRejectedError: SGLang cannot serve the request.
        EngineOverloadedError: its queue is full.
        EngineError: it failed at the request.
    """
    meta = item["meta_info"]
    finish, match = _finish(meta.get("finish_reason"), request)
    sampling = request.sampling
    details = meta.get("cached_tokens_details") or {}
    return Answer(
        token_ids=tuple(item["output_ids"]),
        logprobs=_logprobs(
            meta.get("output_token_logprobs"),
            meta.get("output_top_logprobs"),
            sampling.num_logprobs,
        ),
        prompt_logprobs=_prompt_logprobs(
            meta, sampling.num_prompt_logprobs if with_prompt else None
        ),
        finish=finish,
        match=match,
        num_cached=meta.get("cached_tokens", 0),
        num_tier_cached=details.get("storage", 0),
        num_preemptions=meta.get("num_retractions", 0),
        rounds=tuple(
            RoundCounts(*entry) for entry in meta.get(CUSTOM_PARAMS_KEY) or () if entry is not None
        ),
    )


def _finish(
    reason: Mapping[str, Any] | None, request: GenerationRequest
) -> tuple[FinishReason | None, int | None]:
    if reason is None:
        return None, None
    if reason["type"] == "abort":
        _raise_for(reason, request)
        return FinishReason.ABORT, None
    if reason["type"] == "length":
        return FinishReason.LENGTH, None
    matched = reason.get("matched")
    return FinishReason.STOP, matched if isinstance(matched, int) else None


def _raise_for(reason: Mapping[str, Any], request: GenerationRequest) -> None:
    """An abort with a status is an error; one without was asked for."""
    status = reason.get("status_code")
    if status is None:
        return
    # The first line says what is wrong; the lines behind it draw where.
    message = str(reason.get("message") or "SGLang gave the request up.").partition("\n")[0]
    message = message[:_MAX_MESSAGE_CHARS]
    if status == _BAD_REQUEST:
        structure = request.sampling.structure
        raise RequestRejectedError(message, structure.param if structure else None)
    if status == _UNAVAILABLE:
        raise EngineOverloadedError(message)
    raise EngineError(message)


def _prompt_logprobs(
    meta: Mapping[str, Any], num_top: int | None
) -> tuple[TokenLogprob | None, ...] | None:
    if num_top is None or not meta.get("input_token_logprobs"):
        return None
    first, *rest = meta["input_token_logprobs"]
    del first  # Nothing comes before the first token, so nothing says how likely it was.
    tops = (meta.get("input_top_logprobs") or [None])[1:]
    return (None, *_logprobs(rest, tops, num_top))


def _logprobs(
    own: Sequence[tuple[float, int, object]] | None,
    tops: Sequence[Sequence[tuple[float, int, object]] | None] | None,
    num_top: int | None,
) -> tuple[TokenLogprob, ...]:
    if num_top is None or not own:
        return ()
    return tuple(
        _logprob(logprob, token, top or (), num_top)
        for (logprob, token, _), top in zip(own, tops or [None] * len(own), strict=True)
    )


def _logprob(
    logprob: float, token: int, top: Sequence[tuple[float, int, object]], num_top: int
) -> TokenLogprob:
    best = tuple((token_id, value) for value, token_id, _ in top)
    ranks = (rank for rank, (token_id, _) in enumerate(best, 1) if token_id == token)
    return TokenLogprob(token, logprob, next(ranks, _UNKNOWN_RANK), best[:num_top])


def speculation_stats(rounds: Mapping[RoundCounts, int]) -> SpeculationStats:
    """What verification did.

    Args:
        rounds: how often a step of a sequence came out so.
    """
    drafted = {counts: number for counts, number in rounds.items() if counts.num_draft_tokens}
    histogram = [0] * (1 + max((counts.num_accepted for counts in drafted), default=-1))
    for counts, number in drafted.items():
        histogram[counts.num_accepted] += number

    def total(field: str) -> int:
        return sum(number * getattr(counts, field) for counts, number in rounds.items())

    return SpeculationStats(
        num_spec_steps=sum(drafted.values()),
        num_draft_tokens=total("num_draft_tokens"),
        num_accepted_draft_tokens=total("num_accepted"),
        num_accepted_pool_tokens=total("num_accepted_pool"),
        num_table_hits=total("num_table_hits"),
        num_table_misses=total("num_table_misses"),
        acceptance_histogram=tuple(histogram),
    )
