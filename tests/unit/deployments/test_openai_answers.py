from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from deployments.accounting import RequestTotals
from deployments.choice_text import PlacedLogprob
from deployments.engine.types import (
    FinishReason,
    GenerationRequest,
    GenerationUsage,
    SamplingParams,
    SpeculationStats,
    TokenLogprob,
)
from deployments.errors import RateLimitedError, describe
from deployments.generation import CallContext, Plan, TextDelta
from deployments.openai_answers import SSE_DONE, AnswerWriter, sse_error
from deployments.openai_api import ChatCompletionRequest, CompletionRequest, parse_body
from deployments.tenants import Tenant

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
PLAIN: dict[str, Any] = {"model": "m", "prompt": "aé"}
BYTES = {1: b"a", 2: b"\xc3", 3: b"\xa9", 4: b"<end>", 5: b"b"}
SPECULATION = SpeculationStats(
    num_spec_steps=2,
    num_draft_tokens=8,
    num_accepted_draft_tokens=3,
    num_accepted_pool_tokens=2,
    num_accepted_head_tokens=1,
    num_table_hits=1,
    num_table_misses=1,
    acceptance_histogram=(0, 1, 1, 0, 0),
)


def plan(num_choices: int = 1, prompt: tuple[int, ...] = (1, 2, 3)) -> Plan:
    request = GenerationRequest(
        request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=9, seed=1)
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


def writer_of(
    body: dict[str, Any], num_choices: int = 1, prompt: tuple[int, ...] = (1, 2, 3)
) -> AnswerWriter:
    kind = ChatCompletionRequest if "messages" in body else CompletionRequest
    parsed = parse_body(json.dumps(body).encode(), kind)
    return AnswerWriter(plan(num_choices, prompt), "m", parsed, BYTES.__getitem__)


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
    writer = writer_of(CHAT, 2)
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
    writer = writer_of(CHAT)
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
    assert writer_of(CHAT).delta(text("")) == []


def test_plain_completions_stream_text() -> None:
    writer = writer_of(PLAIN)
    assert writer.opening() == []
    (event,) = parse(writer.delta(text("a")))
    assert event["object"] == "text_completion"
    assert event["choices"][0]["text"] == "a"


def test_usage_is_sent_only_when_asked_for() -> None:
    assert writer_of(CHAT).closing(totals()) == [SSE_DONE]
    writer = writer_of(CHAT | {"stream": True, "stream_options": {"include_usage": True}})
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
        "num_accepted_head_tokens": 1,
        "num_table_hits": 1,
        "num_table_misses": 1,
    }


def test_a_whole_answer_collects_every_choice() -> None:
    writer = writer_of(CHAT, 2)
    for delta in (text("a"), text("x", 1), text("b", 0, FinishReason.LENGTH)):
        writer.collect(delta)
    writer.collect(text("y", 1, FinishReason.ABORT))
    body = writer.body(totals())
    assert body["object"] == "chat.completion"
    assert [choice["message"]["content"] for choice in body["choices"]] == ["ab", "xy"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "stop"]


FIRST = PlacedLogprob(TokenLogprob(5, -0.5, 1, ((5, -0.5), (1, -1.5))), 0)
HALF = PlacedLogprob(TokenLogprob(2, -2.0, 3, ((5, -0.25), (1, -math.inf))), 1)
PROMPT = (None, TokenLogprob(2, -3.0, 2, ((5, -1.0),)), TokenLogprob(3, -4.0, 1, ((3, -4.0),)))


def with_logprobs(*placed: PlacedLogprob, part: str = "", **fields: Any) -> TextDelta:
    return replace(text(part), logprobs=placed, **fields)


def entry(token: str, logprob: float, data: list[int]) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": data}


def test_log_probabilities_of_a_chat_have_openais_shape() -> None:
    body = CHAT | {"logprobs": True, "top_logprobs": 2}
    want = {
        "content": [
            entry("b", -0.5, [98])
            | {"top_logprobs": [entry("b", -0.5, [98]), entry("a", -1.5, [97])]},
            entry("\\xc3", -2.0, [195])
            | {"top_logprobs": [entry("b", -0.25, [98]), entry("a", -9999.0, [97])]},
        ],
        "refusal": None,
    }
    whole = writer_of(body)
    whole.collect(with_logprobs(FIRST, part="b"))
    whole.collect(with_logprobs(HALF, finish_reason=FinishReason.LENGTH))
    assert whole.body(totals())["choices"][0]["logprobs"] == want
    stream = writer_of(body)
    (first,) = parse(stream.delta(with_logprobs(FIRST, part="b")))
    assert first["choices"][0]["logprobs"]["content"] == want["content"][:1]
    # The chunk with the finish reason carries what has no text to come with.
    (end,) = parse(stream.delta(with_logprobs(HALF, finish_reason=FinishReason.LENGTH)))
    assert end["choices"][0]["logprobs"]["content"] == want["content"][1:]
    content, end = parse(
        stream.delta(with_logprobs(HALF, part="é", finish_reason=FinishReason.LENGTH))
    )
    assert content["choices"][0]["logprobs"]["content"] == want["content"][1:]
    assert end["choices"][0]["logprobs"] is None


def test_log_probabilities_of_a_completion_are_lists() -> None:
    writer = writer_of(PLAIN | {"logprobs": 1})
    writer.collect(with_logprobs(FIRST, HALF, part="b\ufffd"))
    assert writer.body(totals())["choices"][0]["logprobs"] == {
        "tokens": ["b", "bytes:\\xc3"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"b": -0.5}, {"b": -0.25, "bytes:\\xc3": -2.0}],
        "text_offset": [0, 1],
    }


ECHOED = {
    "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
    "token_logprobs": [None, -3.0, -4.0],
    "top_logprobs": [None, {"b": -1.0, "bytes:\\xc3": -3.0}, {"bytes:\\xa9": -4.0}],
    "text_offset": [0, 1, 1],
}
OF_PROMPT = [
    None,
    {
        "2": {"logprob": -3.0, "rank": 2, "decoded_token": "\\xc3"},
        "5": {"logprob": -1.0, "rank": 1, "decoded_token": "b"},
    },
    {"3": {"logprob": -4.0, "rank": 1, "decoded_token": "\\xa9"}},
]


@pytest.mark.parametrize("prompt", ["aé", [1, 2, 3]])
def test_an_echo_comes_first_with_its_log_probabilities(prompt: object) -> None:
    body = PLAIN | {"prompt": prompt, "logprobs": 1, "echo": True, "prompt_logprobs": 1}
    delta = with_logprobs(FIRST, part="b", prompt_logprobs=PROMPT)
    whole = writer_of(body)
    whole.collect(delta)
    choice = whole.body(totals())["choices"][0]
    assert choice["text"] == "aéb"
    assert choice["logprobs"] == {
        "tokens": [*ECHOED["tokens"], "b"],
        "token_logprobs": [*ECHOED["token_logprobs"], -0.5],
        "top_logprobs": [*ECHOED["top_logprobs"], {"b": -0.5}],
        "text_offset": [*ECHOED["text_offset"], 2],
    }
    assert choice["prompt_logprobs"] == OF_PROMPT
    stream = writer_of(body)
    echo, first = parse(stream.delta(delta))
    assert echo["choices"][0]["text"] == "aé"
    assert echo["choices"][0]["logprobs"] == ECHOED
    assert echo["choices"][0]["prompt_logprobs"] == OF_PROMPT
    assert first["choices"][0]["text"] == "b"
    assert first["choices"][0]["logprobs"]["text_offset"] == [2]
    (second,) = parse(stream.delta(with_logprobs(HALF, part="é")))
    assert second["choices"][0]["logprobs"]["text_offset"] == [3]


def test_tokens_that_the_tokenizer_put_before_a_prompt_begin_at_its_beginning() -> None:
    writer = writer_of(PLAIN | {"prompt": "b", "logprobs": 0, "echo": True}, prompt=(4, 5))
    writer.collect(with_logprobs(prompt_logprobs=(None, FIRST.logprob)))
    logprobs = writer.body(totals())["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["<end>", "b"]
    assert logprobs["text_offset"] == [0, 0]


def test_an_echo_alone_needs_no_log_probabilities() -> None:
    writer = writer_of(PLAIN | {"echo": True}, 2)
    echo, first = parse(writer.delta(text("b", 1)))
    assert (echo["choices"][0]["index"], echo["choices"][0]["text"]) == (1, "aé")
    assert echo["choices"][0]["logprobs"] is first["choices"][0]["logprobs"] is None
    assert "prompt_logprobs" not in echo["choices"][0]


def test_a_chat_tells_its_prompt_once() -> None:
    body = CHAT | {"prompt_logprobs": 1}
    delta = with_logprobs(part="b", prompt_logprobs=PROMPT)
    whole = writer_of(body, 2)
    whole.collect(delta)
    whole.collect(replace(delta, index=1))
    assert whole.body(totals())["prompt_logprobs"] == OF_PROMPT
    stream = writer_of(body, 2)
    assert "prompt_logprobs" not in parse(stream.delta(replace(delta, index=1)))[0]
    told, first = parse(stream.delta(delta))
    assert told["prompt_logprobs"] == OF_PROMPT
    assert told["choices"][0]["delta"] == {}
    assert first["choices"][0]["delta"] == {"content": "b"}


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
