from __future__ import annotations

import json
from typing import Any

from deployments.accounting import RequestTotals
from deployments.engine.types import (
    FinishReason,
    GenerationRequest,
    GenerationUsage,
    SamplingParams,
    SpeculationStats,
)
from deployments.errors import RateLimitedError, describe
from deployments.generation import CallContext, Plan, TextDelta
from deployments.openai_answers import SSE_DONE, AnswerWriter, sse_error
from deployments.tenants import Tenant

SPECULATION = SpeculationStats(
    num_spec_steps=2,
    num_draft_tokens=8,
    num_accepted_draft_tokens=3,
    num_accepted_pool_tokens=2,
    num_table_hits=1,
    num_table_misses=1,
    acceptance_histogram=(0, 1, 1, 0, 0),
)


def plan(num_choices: int = 1) -> Plan:
    request = GenerationRequest(
        request_id="r", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=9, seed=1)
    )
    return Plan(
        completion_id="abc",
        context=CallContext(
            surface="http", tenant=Tenant(name="t", tenant_key=bytes(32)), deadline=0.0
        ),
        requests=(request,) * num_choices,
        num_choices_per_prompt=num_choices,
        created=7,
    )


def text(part: str, index: int = 0, reason: FinishReason | None = None) -> TextDelta:
    return TextDelta(index=index, text=part, token_ids=(5,), finish_reason=reason, replica_id="x")


def totals(num_output: int = 4) -> RequestTotals:
    result = RequestTotals([3])
    result.add_output(num_output)
    result.replica_id = "x"
    usage = GenerationUsage(
        num_prompt_tokens=3, num_output_tokens=9, num_cached_tokens=2, num_tier_cached_tokens=1
    )
    result.add_finished(0, usage, SPECULATION)
    return result


def parse(events: list[bytes]) -> list[dict[str, Any]]:
    parsed = []
    for event in events:
        assert event.startswith(b"data: ")
        assert event.endswith(b"\n\n")
        assert event.count(b"\n") == 2
        parsed.append(json.loads(event[6:]))
    return parsed


def test_a_chat_stream_begins_with_the_role() -> None:
    writer = AnswerWriter(plan(2), "m", chat=True)
    first, second = parse(writer.opening())
    assert first == {
        "id": "chatcmpl-abc",
        "object": "chat.completion.chunk",
        "created": 7,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
    }
    assert second["choices"][0]["index"] == 1


def test_text_and_finish_reason_come_in_chunks_of_their_own() -> None:
    writer = AnswerWriter(plan(), "m", chat=True)
    content, end = parse(writer.delta(text('a\n"é', reason=FinishReason.STOP)))
    assert content["choices"][0]["delta"] == {"content": 'a\n"é'}
    assert content["choices"][0]["finish_reason"] is None
    assert end["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "stop",
    }


def test_text_that_is_held_back_sends_nothing() -> None:
    assert AnswerWriter(plan(), "m", chat=True).delta(text("")) == []


def test_plain_completions_stream_text() -> None:
    writer = AnswerWriter(plan(), "m", chat=False)
    assert writer.opening() == []
    (event,) = parse(writer.delta(text("a")))
    assert event["object"] == "text_completion"
    assert event["choices"][0]["text"] == "a"


def test_usage_is_sent_only_when_asked_for() -> None:
    assert AnswerWriter(plan(), "m", chat=True).closing(totals()) == [SSE_DONE]
    writer = AnswerWriter(plan(), "m", chat=True, include_usage=True)
    assert parse(writer.delta(text("a")))[0]["usage"] is None
    usage, done = writer.closing(totals())
    assert done == b"data: [DONE]\n\n"
    (event,) = parse([usage])
    assert event["choices"] == []
    assert event["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert event["metrics"]["replica"] == "x"
    assert event["metrics"]["tier_cached_tokens"] == 1
    assert event["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": 2.5,
        "draft_acceptance_rate": 0.375,
        "acceptance_histogram": [0, 1, 1, 0, 0],
        "num_accepted_draft_tokens": 3,
        "num_draft_tokens": 8,
        "num_spec_steps": 2,
        "num_spec_tokens": 4,
        "num_accepted_pool_tokens": 2,
        "num_table_hits": 1,
        "num_table_misses": 1,
    }


def test_a_whole_answer_collects_every_choice() -> None:
    writer = AnswerWriter(plan(2), "m", chat=True)
    for delta in (text("a"), text("x", 1), text("b", 0, FinishReason.LENGTH)):
        writer.collect(delta)
    writer.collect(text("y", 1, FinishReason.ABORT))
    body = writer.body(totals())
    assert body["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in body["choices"]] == ["ab", "xy"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "stop"]


def test_an_error_in_a_stream_is_an_event() -> None:
    event = sse_error(describe(RateLimitedError("slow down")))
    name, data = event.decode().strip().split("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "rate_limit_exceeded"


def test_cached_tokens_of_a_prompt_are_counted_once() -> None:
    result = RequestTotals([10, 20])
    for prompt, cached in ((0, 0), (0, 8), (1, 16), (1, 12)):
        usage = GenerationUsage(num_prompt_tokens=0, num_output_tokens=0, num_cached_tokens=cached)
        result.add_finished(prompt, usage, SPECULATION)
    assert result.usage().num_prompt_tokens == 30
    assert result.usage().num_cached_tokens == 12
    assert result.speculation.num_draft_tokens == 32
    assert result.speculation.acceptance_histogram == (0, 4, 4, 0, 0)
