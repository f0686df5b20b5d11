"""The inference protocol's messages to the engine's types and back; ranges are those of HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deployments.engine.types import FinishReason
from deployments.errors import RequestInvalidError
from deployments.openai_api import Message
from deployments.sampling import SamplingFields, validate
from deployments.tokenizer import ChatTurn
from protos import inference_pb2 as pb

if TYPE_CHECKING:
    from deployments.accounting import RequestTotals
    from deployments.engine.types import GenerationUsage, SpeculationStats
    from deployments.generation import Plan, TextDelta

_MAX_N = 8
_OPTIONAL = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
)

_FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}


def sampling_fields(options: pb.SamplingOptions) -> SamplingFields:
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
    return validate(SamplingFields, data)


def max_tokens(options: pb.SamplingOptions) -> int | None:
    """The output limit, if the client set one.

    Raises:
        RequestInvalidError: it is zero.
    """
    if not options.HasField("max_tokens"):
        return None
    if options.max_tokens < 1:
        raise RequestInvalidError(
            "Invalid value for 'max_tokens': must be at least 1.", param="max_tokens"
        )
    return options.max_tokens


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
        num_table_hits=stats.num_table_hits,
        num_table_misses=stats.num_table_misses,
    )


def chunk_message(plan: Plan, delta: TextDelta, totals: RequestTotals | None) -> pb.GenerateChunk:
    """One delta; ``totals`` only with the stream's last one."""
    chunk = pb.GenerateChunk(
        request_id=plan.completion_id,
        choice_index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        replica=delta.replica_id,
    )
    if delta.finish_reason is not None:
        chunk.finish_reason = _FINISH_REASONS[delta.finish_reason]
    if totals is not None:
        chunk.usage.CopyFrom(usage_message(totals.usage()))
        chunk.speculation.CopyFrom(speculation_message(totals.speculation))
    return chunk


class ResponseBuilder:
    """Collects a whole answer."""

    def __init__(self, plan: Plan, model: str) -> None:
        self._response = pb.GenerateResponse(request_id=plan.completion_id, model=model)
        for index in range(len(plan.requests)):
            self._response.choices.add(index=index)

    def collect(self, delta: TextDelta) -> None:
        """Add one delta."""
        choice = self._response.choices[delta.index]
        choice.text += delta.text
        choice.token_ids.extend(delta.token_ids)
        if delta.finish_reason is not None:
            choice.finish_reason = _FINISH_REASONS[delta.finish_reason]

    def build(self, totals: RequestTotals) -> pb.GenerateResponse:
        """The answer."""
        self._response.usage.CopyFrom(usage_message(totals.usage()))
        self._response.speculation.CopyFrom(speculation_message(totals.speculation))
        self._response.replica = totals.replica_id
        return self._response
