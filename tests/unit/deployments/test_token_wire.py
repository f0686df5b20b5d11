"""Every message, engine type and engine error comes back as it was sent."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine import errors
from deployments.engine.types import (
    FinishReason,
    GenerationRequest,
    GenerationUsage,
    SamplingParams,
    SpeculationStats,
    StructuredOutput,
    StructureKind,
    TokenDelta,
    TokenLogprob,
)
from deployments.token_wire import (
    VERSION,
    Admission,
    Cancel,
    Delta,
    Hello,
    MessageReader,
    Start,
    Welcome,
    WireError,
    decode,
    encode,
    error_of,
    failure_of,
    from_wire,
    to_wire,
)

if TYPE_CHECKING:
    from deployments.token_wire import Message

REQUEST = GenerationRequest(
    request_id="r-1",
    prompt_token_ids=(1, 2, 3),
    sampling=SamplingParams(
        max_tokens=5,
        seed=2**64 - 1,
        temperature=0.1 + 0.2,
        logit_bias=((3, -1.5),),
        stop_strings=("\n", "é\u2028"),
        bad_token_sequences=((1,), (2, 3)),
        structure=StructuredOutput(kind=StructureKind.REGEX, text="a\n\\d"),
    ),
    choice_index=2,
    resumed_output_ids=(9,),
    tenant_key=bytes(range(224, 256)),
    deadline=1795998166.9526608,
    avoid_replicas=("a", "b"),
)


def there_and_back(message: Message) -> Message:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return decode(line[:-1])


@pytest.mark.parametrize(
    "message",
    [
        Hello(VERSION, "secret"),
        Start(7, 64, REQUEST),
        Start(8, 1, replace(REQUEST, deadline=None, sampling=SamplingParams(max_tokens=1, seed=0))),
        Cancel(7),
        Welcome(VERSION, "replica"),
        Admission(7, is_accepted=True, num_running=3),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_come_back(message: Message) -> None:
    assert there_and_back(message) == message


logprobs = st.builds(
    TokenLogprob,
    st.integers(0, 2**20),
    st.floats(max_value=0.0, allow_nan=False) | st.just(-math.inf),
    st.integers(0, 9),
    st.lists(st.tuples(st.integers(0, 9), st.floats(-9.0, 0.0)), max_size=2).map(tuple),
)


@given(
    token_ids=st.lists(st.integers(0, 2**20), max_size=4).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_match=st.none() | st.text() | st.integers(0, 2**20),
    told=st.lists(logprobs, max_size=3).map(tuple),
    about_prompt=st.none() | st.lists(st.none() | logprobs, max_size=3).map(tuple),
    has_counts=st.booleans(),
)
def test_deltas_come_back(
    token_ids: tuple[int, ...],
    finish_reason: FinishReason | None,
    stop_match: str | int | None,
    told: tuple[TokenLogprob, ...],
    about_prompt: tuple[TokenLogprob | None, ...] | None,
    *,
    has_counts: bool,
) -> None:
    delta = TokenDelta(
        request_id=REQUEST.request_id,
        token_ids=token_ids,
        choice_index=REQUEST.choice_index,
        finish_reason=finish_reason,
        stop_match=stop_match,
        usage=GenerationUsage(num_prompt_tokens=3, num_output_tokens=4) if has_counts else None,
        speculation=SpeculationStats(acceptance_histogram=(1, 2)) if has_counts else None,
        replica_id="replica",
        logprobs=told,
        prompt_logprobs=about_prompt,
    )
    received = there_and_back(to_wire(5, delta))
    assert isinstance(received, Delta)
    assert received.stream == 5
    assert from_wire(received, REQUEST, "replica") == delta


def engine_errors() -> list[errors.EngineError]:
    kinds = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.EngineError)
    ]
    return [
        *(kind("what happened") for kind in kinds),
        errors.RequestRejectedError("too long", "prompt"),
        errors.EngineOverloadedError("full", 2.5),
        errors.EngineDeadError("dead", "replica"),
    ]


@pytest.mark.parametrize("error", engine_errors(), ids=repr)
def test_engine_errors_come_back(error: errors.EngineError) -> None:
    failure = there_and_back(failure_of(5, error))
    received = error_of(failure)
    assert type(received) is type(error)
    assert received.args == error.args
    assert vars(received) == vars(error)


def test_another_error_is_the_target_s_fault() -> None:
    received = error_of(there_and_back(failure_of(5, KeyError("bug"))))
    assert type(received) is RuntimeError
    assert "KeyError" in str(received)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x[1]",
        b"h",
        b"h[1]",
        b'c["one"]',
        b'd[1,["x"]]',
        b's[1,1,{"request_id":"r"}]',
        b"d[1,[2]] trailing",
        b"\xff\xfe",
    ],
)
def test_what_is_no_message_is_refused_without_telling_it(line: bytes) -> None:
    with pytest.raises(WireError) as caught:
        decode(line)
    assert "request_id" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_messages_are_put_together_from_pieces(size: int) -> None:
    messages = [Cancel(1), Cancel(22), Hello(1, "key"), Cancel(333)]
    sent = b"".join(map(encode, messages))
    reader = MessageReader(64)
    pieces = [sent[start : start + size] for start in range(0, len(sent), size)]
    assert [message for piece in pieces for message in reader.feed(piece)] == messages


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_too_long_is_refused_as_soon_as_it_is(end: bytes) -> None:
    reader = MessageReader(64)
    assert list(reader.feed(encode(Cancel(1)) + b"c[" + b"1" * 40)) == [Cancel(1)]
    with pytest.raises(WireError, match="too long"):
        list(reader.feed(b"1" * 40 + end))
