"""OpenAI's answers: JSON bodies and server-sent events."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Literal

import orjson

from deployments.engine.types import FinishReason
from deployments.openai_api import ChatCompletionRequest, CompletionRequest
from deployments.openai_logprobs import (
    CompletionLogprobs,
    chat_logprobs,
    prompt_logprobs,
    prompt_offsets,
    prompt_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from deployments.accounting import RequestTotals
    from deployments.choice_text import PlacedLogprob
    from deployments.embedding import EmbeddingAnswer
    from deployments.engine.types import GenerationUsage, SpeculationStats, TokenLogprob
    from deployments.errors import ApiError
    from deployments.generation import Plan, TextDelta
    from deployments.openai_api import OpenAIRequest
    from deployments.openai_logprobs import BytesOf

    PromptLogprobs = Sequence[TokenLogprob | None]

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
        "num_accepted_head_tokens": stats.num_accepted_head_tokens,
        "num_table_hits": stats.num_table_hits,
        "num_table_misses": stats.num_table_misses,
    }


class TokenReport:
    """What one answer tells of its tokens besides their text.

    Attributes:
        echoes: the prompt's text for each choice; empty where it is not asked for.
    """

    def __init__(self, plan: Plan, body: OpenAIRequest, bytes_of: BytesOf) -> None:
        self._num_logprobs = body.num_logprobs
        self._num_prompt_logprobs = body.prompt_logprobs
        self._chat = isinstance(body, ChatCompletionRequest)
        self._prompts = [request.prompt_token_ids for request in plan.requests]
        self._bytes_of = bytes_of
        self.echoes = [""] * len(plan.requests)
        if isinstance(body, CompletionRequest) and body.echo:
            texts = [
                prompt if isinstance(prompt, str) else prompt_text(prompt, bytes_of)
                for prompt in body.prompts()
            ]
            self.echoes = [text for text in texts for _ in range(plan.num_choices_per_prompt)]

    def logprobs(
        self,
        index: int,
        placed: Iterable[PlacedLogprob],
        prompt: PromptLogprobs | None = None,
    ) -> dict[str, Any] | None:
        """A choice's ``logprobs``; None if they were not asked for.

        Args:
            index: of the choice.
            placed: output tokens.
            prompt: of the prompt's tokens, where an echo is part of what they belong to.
        """
        if self._num_logprobs is None:
            return None
        if self._chat:
            return chat_logprobs(placed, self._bytes_of)
        lists = CompletionLogprobs(self._bytes_of)
        echo = self.echoes[index]
        if echo and prompt is not None:
            token_ids = self._prompts[index]
            offsets = prompt_offsets(token_ids, echo, self._bytes_of)
            for token_id, logprob, offset in zip(token_ids, prompt, offsets, strict=True):
                lists.add(token_id, logprob, offset, self._num_logprobs)
        for logprob, offset in placed:
            lists.add(logprob.token_id, logprob, len(echo) + offset, self._num_logprobs)
        return lists.body()

    def prompt(self, prompt: PromptLogprobs | None) -> dict[str, Any]:
        """The field ``prompt_logprobs``; nothing if it was not asked for."""
        if prompt is None or self._num_prompt_logprobs is None:
            return {}
        shown = prompt_logprobs(prompt, self._num_prompt_logprobs, self._bytes_of)
        return {"prompt_logprobs": shown}


class AnswerWriter:
    """Shapes one answer, streamed or whole, for chat or plain completions."""

    def __init__(self, plan: Plan, model: str, body: OpenAIRequest, bytes_of: BytesOf) -> None:
        """Begin an answer.

        Args:
            plan: made from ``body``.
            model: the served model's id.
            body: says what the answer shall tell.
            bytes_of: the bytes a token id stands for.
        """
        self._chat = isinstance(body, ChatCompletionRequest)
        options = body.stream_options
        self._include_usage = options is not None and options.include_usage
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{plan.completion_id}"
        self._model = model
        self._created = plan.created
        self._report = TokenReport(plan, body, bytes_of)
        self._texts = list(self._report.echoes)
        self._logprobs: list[list[PlacedLogprob]] = [[] for _ in plan.requests]
        self._prompts: dict[int, PromptLogprobs | None] = {}
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
        events = self._about_prompt(delta)
        logprobs = self._report.logprobs(delta.index, delta.logprobs) if delta.logprobs else None
        if delta.text:
            shape = {"delta": {"content": delta.text}} if self._chat else {"text": delta.text}
            events.append(self._chunk(delta.index, shape, None, logprobs))
            logprobs = None
        if delta.finish_reason is not None:
            last: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
            reason = _FINISH_REASONS[delta.finish_reason]
            events.append(self._chunk(delta.index, last, reason, logprobs))
        return events

    def _about_prompt(self, delta: TextDelta) -> list[bytes]:
        """What stands before a choice's first text: the prompt, where it is told at all."""
        index, prompt = delta.index, delta.prompt_logprobs
        if index in self._prompts:
            return []
        self._prompts[index] = prompt
        told = self._report.prompt(prompt)
        if self._chat:
            return [self._chunk(index, {"delta": {}}, None, **told)] if told and not index else []
        echo = self._report.echoes[index]
        if not echo and not told:
            return []
        logprobs = self._report.logprobs(index, (), prompt) if echo else None
        return [self._chunk(index, {"text": echo} | told, None, logprobs)]

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
        self._logprobs[delta.index] += delta.logprobs
        self._prompts.setdefault(delta.index, delta.prompt_logprobs)
        if delta.finish_reason is not None:
            self._finish[delta.index] = _FINISH_REASONS[delta.finish_reason]

    def body(self, totals: RequestTotals) -> dict[str, Any]:
        """The whole answer."""
        return self._head(chunk=False) | {
            "choices": [self._choice(index) for index in range(len(self._texts))],
            "usage": usage_body(totals.usage()),
            "metrics": metrics_body(totals),
            **(self._report.prompt(self._prompts.get(0)) if self._chat else {}),
        }

    def _head(self, *, chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self._chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _chunk(
        self,
        index: int,
        shape: dict[str, Any],
        finish_reason: str | None,
        logprobs: dict[str, Any] | None = None,
        **more: object,
    ) -> bytes:
        choice = {"index": index, **shape, "logprobs": logprobs, "finish_reason": finish_reason}
        event = self._head(chunk=True) | {"choices": [choice]} | more
        if self._include_usage:
            event["usage"] = None
        return sse(event)

    def _choice(self, index: int) -> dict[str, Any]:
        text = self._texts[index]
        prompt = self._prompts.get(index)
        shape: dict[str, Any] = {"text": text} | self._report.prompt(prompt)
        if self._chat:
            shape = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {
            "index": index,
            **shape,
            "logprobs": self._report.logprobs(index, self._logprobs[index], prompt),
            "finish_reason": self._finish[index],
        }


def embeddings_body(
    answer: EmbeddingAnswer, model: str, encoding_format: Literal["float", "base64"]
) -> dict[str, Any]:
    """The answer of ``POST /v1/embeddings``."""

    def encoded(vector: NDArray[np.float32]) -> list[float] | str:
        if encoding_format == "base64":
            return base64.b64encode(vector.astype("<f4").tobytes()).decode()
        numbers: list[float] = vector.tolist()
        return numbers

    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encoded(vector)}
            for index, vector in enumerate(answer.vectors)
        ],
        "model": model,
        "usage": {
            "prompt_tokens": answer.usage.num_prompt_tokens,
            "total_tokens": answer.usage.num_prompt_tokens,
            "prompt_tokens_details": {"cached_tokens": answer.usage.num_cached_tokens},
        },
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
