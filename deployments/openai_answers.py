"""OpenAI's answers: JSON bodies and server-sent events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from deployments.engine.types import FinishReason

if TYPE_CHECKING:
    from deployments.accounting import RequestTotals
    from deployments.engine.types import GenerationUsage, SpeculationStats
    from deployments.errors import ApiError
    from deployments.generation import Plan, TextDelta

SSE_DONE = b"data: [DONE]\n\n"

_FINISH_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    # OpenAI has no word for an output that the operator ended.
    FinishReason.ABORT: "stop",
}


def sse(event: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(event) + b"\n\n"


def sse_error(error: ApiError) -> bytes:
    """An error after the stream has begun; no ``[DONE]`` follows it."""
    return b"event: error\ndata: " + orjson.dumps(error.body()) + b"\n\n"


def usage_body(usage: GenerationUsage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_output_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }


def metrics_body(totals: RequestTotals) -> dict[str, Any]:
    """What happened below: the replica, the KV tier, and speculation in vLLM's shape."""
    return {
        "replica": totals.replica_id,
        "tier_cached_tokens": totals.usage().num_tier_cached_tokens,
        "speculative_decoding": speculation_body(totals.speculation),
    }


def speculation_body(stats: SpeculationStats) -> dict[str, Any]:
    """VLLM's per-request speculation metrics, and what only split speculation has."""
    drafted = stats.num_draft_tokens
    return {
        "mean_acceptance_length": stats.mean_acceptance_length,
        "draft_acceptance_rate": stats.num_accepted_draft_tokens / drafted if drafted else 0.0,
        "acceptance_histogram": list(stats.acceptance_histogram),
        "num_accepted_draft_tokens": stats.num_accepted_draft_tokens,
        "num_draft_tokens": drafted,
        "num_spec_steps": stats.num_spec_steps,
        "num_spec_tokens": max(0, len(stats.acceptance_histogram) - 1),
        "num_accepted_pool_tokens": stats.num_accepted_pool_tokens,
        "num_table_hits": stats.num_table_hits,
        "num_table_misses": stats.num_table_misses,
    }


class AnswerWriter:
    """Shapes one answer, streamed or whole, for chat or plain completions."""

    def __init__(self, plan: Plan, model: str, *, chat: bool, include_usage: bool = False) -> None:
        self._chat = chat
        self._include_usage = include_usage
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{plan.completion_id}"
        self._model = model
        self._created = plan.created
        self._texts = [""] * len(plan.requests)
        self._finish: list[str | None] = [None] * len(plan.requests)

    def opening(self) -> list[bytes]:
        """Events before any text: in chat, one with the role per choice."""
        if not self._chat:
            return []
        return [
            self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None)
            for index in range(len(self._texts))
        ]

    def delta(self, delta: TextDelta) -> list[bytes]:
        """Events of one text delta; none while a character or stop string is incomplete."""
        events = []
        if delta.text:
            shape = {"delta": {"content": delta.text}} if self._chat else {"text": delta.text}
            events.append(self._chunk(delta.index, shape, None))
        if delta.finish_reason is not None:
            last: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
            events.append(self._chunk(delta.index, last, _FINISH_REASONS[delta.finish_reason]))
        return events

    def closing(self, totals: RequestTotals) -> list[bytes]:
        """Events behind the last text: usage if asked for, then the end mark."""
        events = [SSE_DONE]
        if self._include_usage:
            event = self._head(chunk=True) | {
                "choices": [],
                "usage": usage_body(totals.usage()),
                "metrics": metrics_body(totals),
            }
            events.insert(0, sse(event))
        return events

    def collect(self, delta: TextDelta) -> None:
        """Add a delta to the whole answer."""
        self._texts[delta.index] += delta.text
        if delta.finish_reason is not None:
            self._finish[delta.index] = _FINISH_REASONS[delta.finish_reason]

    def body(self, totals: RequestTotals) -> dict[str, Any]:
        """The whole answer."""
        return self._head(chunk=False) | {
            "choices": [self._choice(index) for index in range(len(self._texts))],
            "usage": usage_body(totals.usage()),
            "metrics": metrics_body(totals),
        }

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(self, index: int, shape: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = {"index": index, **shape, "logprobs": None, "finish_reason": finish_reason}
        event = self._head(chunk=True) | {"choices": [choice]}
        if self._include_usage:
            event["usage"] = None
        return sse(event)

    def _choice(self, index: int) -> dict[str, Any]:
        text = self._texts[index]
        shape: dict[str, Any] = {"text": text}
        if self._chat:
            shape = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {
            "index": index,
            **shape,
            "logprobs": None,
            "finish_reason": self._finish[index],
        }


def model_body(model: str, created: int, max_model_len: int) -> dict[str, Any]:
    """One entry of ``GET /v1/models``."""
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "paceline",
        "max_model_len": max_model_len,
    }
