"""The inference protocol's messages to the engine's types and back; ranges are those of HTTP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deployments.engine.embedding import Pooling
from deployments.engine.types import FinishReason
from deployments.errors import RequestInvalidError
from deployments.openai_api import EmbeddingCall, Message
from deployments.openai_structure import StructuredOutputs, requested_structure
from deployments.sampling import MAX_TPOT_TARGET_S, NumLogprobs, SamplingFields
from deployments.tokenizer import ChatTurn
from deployments.wire_model import validate
from protos import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from deployments.accounting import RequestTotals
    from deployments.embedding import EmbeddingAnswer
    from deployments.engine.types import (
        GenerationUsage,
        SpeculationStats,
        StructuredOutput,
        TokenLogprob,
    )
    from deployments.generation import Plan, TextDelta

_MAX_N = 8
_STRUCTURE = "structured_output"
_OPTIONAL = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "logprobs",
    "prompt_logprobs",
)

_POOLINGS = {
    pb.POOLING_UNSPECIFIED: Pooling.MEAN,
    pb.POOLING_MEAN: Pooling.MEAN,
    pb.POOLING_LAST: Pooling.LAST,
}
_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}


class GrpcSamplingFields(SamplingFields):
    """``SamplingOptions`` as they are validated."""

    logprobs: NumLogprobs | None = None
    """Tell the log probability of each output token, and as many of the likeliest tokens."""

    @property
    def num_logprobs(self) -> int | None:
        """See ``SamplingFields``."""
        return self.logprobs


def sampling_fields(options: pb.SamplingOptions) -> GrpcSamplingFields:
    """Sampling options, checked.

    Raises:
        RequestInvalidError: a value is out of range.
    """
    data: dict[str, Any] = {
        field.name: value for field, value in options.ListFields() if field.name in _OPTIONAL
    }
    data["logit_bias"] = {str(token): bias for token, bias in options.logit_bias.items()}
    data["stop"] = list(options.stop)
    data["stop_token_ids"] = list(options.stop_token_ids)
    data["ignore_eos"] = options.ignore_eos
    data["min_tokens"] = options.min_tokens
    data["bad_words"] = list(options.bad_words)
    return validate(GrpcSamplingFields, data)


def structured_output(options: pb.SamplingOptions) -> StructuredOutput | None:
    """The form asked for, if one is.

    Raises:
        RequestInvalidError: it is empty or too long, or says that no JSON object is wanted.
    """
    if not options.HasField("structured_output"):
        return None
    name = options.structured_output.WhichOneof("form")
    if name is None:
        raise RequestInvalidError(f"'{_STRUCTURE}' has no form.", param=_STRUCTURE)
    value = getattr(options.structured_output, name)
    fields: dict[str, Any] = {"json" if name == "json_schema" else name: value}
    if name == "choice":
        fields = {"choice": list(value.texts)}
    try:
        wanted = validate(StructuredOutputs, fields)
    except RequestInvalidError as error:
        raise RequestInvalidError(error.message, f"{_STRUCTURE}.{name}") from error
    structure = requested_structure(None, wanted)
    return None if structure is None else replace(structure, param=_STRUCTURE)


def max_tokens(options: pb.SamplingOptions) -> int | None:
    """The output limit, if the client set one."""
    return options.max_tokens if options.HasField("max_tokens") else None


def num_choices(request: pb.GenerateRequest) -> int:
    """Choices asked for.

    Raises:
        RequestInvalidError: not in 1..8.
    """
    if not request.HasField("n"):
        return 1
    if not 1 <= request.n <= _MAX_N:
        raise RequestInvalidError(f"Invalid value for 'n': must be in 1..{_MAX_N}.", param="n")
    return request.n


def tpot_target_s(request: pb.GenerateRequest) -> float | None:
    """Seconds per output token, at most, if the client set a target.

    Raises:
        RequestInvalidError: not positive, or longer than a target may be.
    """
    if not request.HasField("tpot_target_s"):
        return None
    if not 0 < request.tpot_target_s <= MAX_TPOT_TARGET_S:
        raise RequestInvalidError(
            f"Invalid value for 'tpot_target_s': must be in (0, {MAX_TPOT_TARGET_S:g}].",
            param="tpot_target_s",
        )
    return request.tpot_target_s


def chat_turns(chat: pb.ChatMessages) -> list[ChatTurn]:
    """The conversation, checked like the HTTP surface's messages.

    Raises:
        RequestInvalidError: no message, or an unknown role.
    """
    if not chat.messages:
        raise RequestInvalidError("'messages' must not be empty.", param="messages")
    turns: list[ChatTurn] = []
    for index, message in enumerate(chat.messages):
        try:
            checked = validate(Message, {"role": message.role, "content": message.content})
        except RequestInvalidError as error:
            raise RequestInvalidError(error.message, f"messages[{index}].{error.param}") from error
        turns.append(ChatTurn(checked.role, checked.text()))
    return turns


def embedding_call(request: pb.EmbedRequest) -> EmbeddingCall:
    """What is asked for; vectors are means of length 1 by default.

    Raises:
        RequestInvalidError: there are no inputs, or one is missing, or the pooling is unknown.
    """
    pooling = _POOLINGS.get(request.pooling)
    if pooling is None:
        raise RequestInvalidError("Invalid value for 'pooling'.", param="pooling")
    if not request.inputs:
        raise RequestInvalidError("'inputs' must not be empty.", param="inputs")
    texts: list[str | list[int]] = []
    for index, item in enumerate(request.inputs):
        kind = item.WhichOneof("input")
        if kind is None:
            raise RequestInvalidError("An input is missing.", param=f"inputs[{index}]")
        texts.append(item.text if kind == "text" else list(item.token_ids.ids))
    normalize = request.normalize if request.HasField("normalize") else True
    return EmbeddingCall(texts, pooling, normalize, param="inputs")


def embed_response(answer: EmbeddingAnswer, model: str) -> pb.EmbedResponse:
    """The vectors, in the order of the inputs."""
    return pb.EmbedResponse(
        request_id=answer.request_id,
        model=model,
        embeddings=[pb.Embedding(values=vector.tolist()) for vector in answer.vectors],
        usage=usage_message(answer.usage),
        replica=answer.replica_id,
    )


def usage_message(usage: GenerationUsage) -> pb.Usage:
    """Token counts."""
    return pb.Usage(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_output_tokens,
        cached_tokens=usage.num_cached_tokens,
        tier_cached_tokens=usage.num_tier_cached_tokens,
    )


def speculation_message(stats: SpeculationStats) -> pb.SpeculationStats:
    """Draft tokens by outcome."""
    drafted = stats.num_draft_tokens
    return pb.SpeculationStats(
        mean_acceptance_length=stats.mean_acceptance_length,
        draft_acceptance_rate=stats.num_accepted_draft_tokens / drafted if drafted else 0.0,
        acceptance_histogram=stats.acceptance_histogram,
        num_accepted_draft_tokens=stats.num_accepted_draft_tokens,
        num_draft_tokens=drafted,
        num_spec_steps=stats.num_spec_steps,
        num_accepted_pool_tokens=stats.num_accepted_pool_tokens,
        num_accepted_head_tokens=stats.num_accepted_head_tokens,
        num_table_hits=stats.num_table_hits,
        num_table_misses=stats.num_table_misses,
    )


def logprob_messages(
    logprobs: Iterable[TokenLogprob], bytes_of: Callable[[int], bytes]
) -> list[pb.TokenLogprob]:
    """Tokens with their alternatives."""
    return [
        pb.TokenLogprob(
            token_id=own.token_id,
            token=bytes_of(own.token_id),
            logprob=own.logprob,
            rank=own.rank,
            top=[
                pb.TokenLogprob(
                    token_id=token_id, token=bytes_of(token_id), logprob=logprob, rank=rank
                )
                for rank, (token_id, logprob) in enumerate(own.top, 1)
            ],
        )
        for own in logprobs
    ]


def prompt_logprob_messages(
    plan: Plan, delta: TextDelta, bytes_of: Callable[[int], bytes]
) -> list[pb.TokenLogprob]:
    """The prompt's tokens, if ``delta`` brings them; the first one has no log probability."""
    if delta.prompt_logprobs is None:
        return []
    first = plan.requests[delta.index].prompt_token_ids[0]
    rest = [logprob for logprob in delta.prompt_logprobs if logprob is not None]
    return [
        pb.TokenLogprob(token_id=first, token=bytes_of(first)),
        *logprob_messages(rest, bytes_of),
    ]


def chunk_message(
    plan: Plan,
    delta: TextDelta,
    totals: RequestTotals | None,
    bytes_of: Callable[[int], bytes],
) -> pb.GenerateChunk:
    """One delta.

    Args:
        plan: of the call.
        delta: one of its stream.
        totals: only with the stream's last delta.
        bytes_of: the bytes a token id stands for.
    """
    chunk = pb.GenerateChunk(
        request_id=plan.completion_id,
        choice_index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        replica=delta.replica_id,
        logprobs=logprob_messages((placed.logprob for placed in delta.logprobs), bytes_of),
        prompt_logprobs=prompt_logprob_messages(plan, delta, bytes_of),
    )
    if delta.finish_reason is not None:
        chunk.finish_reason = _FINISH_REASONS[delta.finish_reason]
    if totals is not None:
        chunk.usage.CopyFrom(usage_message(totals.usage()))
        chunk.speculation.CopyFrom(speculation_message(totals.speculation))
    return chunk


class ResponseBuilder:
    """Collects a whole answer."""

    def __init__(self, plan: Plan, model: str, bytes_of: Callable[[int], bytes]) -> None:
        self._plan = plan
        self._bytes_of = bytes_of
        self._response = pb.GenerateResponse(request_id=plan.completion_id, model=model)
        for index in range(len(plan.requests)):
            self._response.choices.add(index=index)

    def collect(self, delta: TextDelta) -> None:
        """Add one delta."""
        choice = self._response.choices[delta.index]
        choice.text += delta.text
        choice.token_ids.extend(delta.token_ids)
        placed = (placed.logprob for placed in delta.logprobs)
        choice.logprobs.extend(logprob_messages(placed, self._bytes_of))
        if not self._response.prompt_logprobs:
            about_prompt = prompt_logprob_messages(self._plan, delta, self._bytes_of)
            self._response.prompt_logprobs.extend(about_prompt)
        if delta.finish_reason is not None:
            choice.finish_reason = _FINISH_REASONS[delta.finish_reason]

    def build(self, totals: RequestTotals) -> pb.GenerateResponse:
        """The answer."""
        self._response.usage.CopyFrom(usage_message(totals.usage()))
        self._response.speculation.CopyFrom(speculation_message(totals.speculation))
        self._response.replica = totals.replica_id
        return self._response
