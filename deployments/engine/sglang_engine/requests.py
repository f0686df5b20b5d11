"""A generation in SGLang's words."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import blake3

from deployments.engine.errors import RequestRejectedError
from deployments.engine.sglang_engine.own_params import CUSTOM_PARAMS_KEY, own_params
from deployments.engine.types import StructureKind

if TYPE_CHECKING:
    from deployments.engine.types import GenerationRequest, SamplingParams, StructuredOutput
    from deployments.engine.validation import ModelLimits

_ANY_OBJECT = '{"type": "object"}'
_SALT_CONTEXT = "paceline sglang cache salt 1"


def refuse_unsupported(request: GenerationRequest) -> None:
    """Refuse what SGLang does not do as the seam says it is done.

    Raises:
        RequestRejectedError: names the field.
    """
    sampling = request.sampling
    if request.capture is not None:
        raise RequestRejectedError("SGLang replicas give no hidden states.", "capture")
    if sampling.repetition_penalty != 1.0:
        raise RequestRejectedError(
            "SGLang replicas count repetition over the output alone; repetition_penalty is not "
            "supported.",
            "repetition_penalty",
        )
    if any(len(sequence) > 1 for sequence in sampling.bad_token_sequences):
        raise RequestRejectedError(
            "SGLang replicas can only exclude single tokens; a bad word has several.", "bad_words"
        )


def generation_arguments(
    request: GenerationRequest, limits: ModelLimits, rid: str
) -> dict[str, Any]:
    """Keyword arguments of ``sglang.Engine.async_generate``.

    Args:
        request: validated, and nothing that ``refuse_unsupported`` refuses.
        limits: of the model.
        rid: SGLang's name for it; no other one may begin with it, because SGLang aborts by prefix.
    """
    sampling = request.sampling
    arguments: dict[str, Any] = {
        "rid": rid,
        "input_ids": [*request.prompt_token_ids, *request.resumed_output_ids],
        "sampling_params": _sampling_params(request, limits),
        "stream": True,
        "priority": request.priority,
        "cache_salt": cache_salt(request.tenant_key),
    }
    if request.traceparent is not None:
        arguments["external_trace_header"] = {"traceparent": request.traceparent}
    asked = [
        count
        for count in (sampling.num_logprobs, num_prompt_logprobs(request))
        if count is not None
    ]
    if asked:
        # One at least: without it nobody would know whether a token is the likeliest.
        arguments |= {"return_logprob": True, "top_logprobs_num": max(1, *asked)}
        is_from_start = num_prompt_logprobs(request) is not None
        arguments["logprob_start_len"] = 0 if is_from_start else -1
    return arguments


def num_prompt_logprobs(request: GenerationRequest) -> int | None:
    """Alternatives to tell of each prompt token; with resumed output that has been done."""
    return None if request.resumed_output_ids else request.sampling.num_prompt_logprobs


def cache_salt(tenant_key: bytes) -> str:
    """What keeps the cached prefixes of two tenants apart.

    SGLang tells the salt to whoever reads its KV events, so it is derived from the tenant's key
    and does not give it away.
    """
    return blake3.blake3(tenant_key, derive_key_context=_SALT_CONTEXT).hexdigest(length=16)


def _sampling_params(request: GenerationRequest, limits: ModelLimits) -> dict[str, Any]:
    sampling = request.sampling
    num_resumed = len(request.resumed_output_ids)
    # SGLang never lets a stop token come before ``min_new_tokens``, the seam lets it come without
    # ending the output. Until then the engine alone decides where the output ends.
    is_endless = sampling.ignore_eos or sampling.min_tokens > num_resumed
    parameters: dict[str, Any] = {
        # SGLang chooses a token in any case; the seam drops it where none was asked for.
        "max_new_tokens": max(1, limits.max_output_tokens(request) - num_resumed),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "ignore_eos": is_endless,
        "custom_params": {CUSTOM_PARAMS_KEY: own_params(request)},
    }
    if not is_endless:
        parameters["stop_token_ids"] = sorted(limits.stop_token_ids(request))
    if bias := _logit_bias(request):
        parameters["logit_bias"] = bias
    if sampling.structure is not None:
        parameters |= _structure(sampling.structure)
    return parameters


def _logit_bias(request: GenerationRequest) -> dict[str, float]:
    """The request's own, tokens that must not come, and penalties of resumed output.

    SGLang takes resumed output for a part of the prompt, which it does not penalise.
    """
    sampling = request.sampling
    bias: defaultdict[int, float] = defaultdict(float)
    for token, value in (*sampling.logit_bias, *_resumed_penalties(request, sampling)):
        bias[token] += value
    for (token,) in sampling.bad_token_sequences:
        bias[token] = -math.inf
    return {str(token): value for token, value in bias.items()}


def _resumed_penalties(
    request: GenerationRequest, sampling: SamplingParams
) -> list[tuple[int, float]]:
    if not sampling.presence_penalty and not sampling.frequency_penalty:
        return []
    return [
        (token, -sampling.presence_penalty - count * sampling.frequency_penalty)
        for token, count in Counter(request.resumed_output_ids).items()
    ]


def _structure(structure: StructuredOutput) -> dict[str, str]:
    match structure.kind:
        case StructureKind.JSON_SCHEMA:
            return {"json_schema": structure.text}
        case StructureKind.JSON_OBJECT:
            return {"json_schema": _ANY_OBJECT}
        case StructureKind.REGEX:
            return {"regex": structure.text}
        case StructureKind.CHOICE:
            return {"ebnf": _choice_grammar(structure)}
        case StructureKind.GRAMMAR:
            return {"ebnf": structure.text}


def _choice_grammar(structure: StructuredOutput) -> str:
    choices = json.loads(structure.text)
    if not choices:
        raise RequestRejectedError(
            f"Invalid choice in '{structure.param}': there is nothing to choose from.",
            structure.param,
        )
    rule = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
    return f"start: {rule}"
