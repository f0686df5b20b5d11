"""What the engine makes of SGLang's items, and of SGLang's end."""

from __future__ import annotations

import asyncio
import time

import pytest

from deployments.engine.base import SharesPages
from deployments.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    EngineOverloadedError,
    RequestRejectedError,
)
from deployments.engine.sglang_engine.engine import SGLangEngine
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.types import FinishReason
from deployments.engine.validation import ModelLimits
from kv_store import PageStoreStats
from tests.fakes_async import eventually
from tests.fakes_engine import make_request
from tests.fakes_sglang import FakeRuntime, item

LIMITS = ModelLimits(vocab_size=100, max_model_len=64, eos_token_ids=frozenset({2}))
LENGTH = {"type": "length", "length": 3}
FULL = {"type": "abort", "message": "The request queue is full.", "status_code": 503}


def letters(token_ids):
    return "".join(chr(ord("a") + token % 26) for token in token_ids)


def engine_of(runtime):
    return SGLangEngine(runtime, LIMITS, detokenize=letters, speculator=NoSpeculation())


async def test_what_is_shared_is_counted_where_it_is_shared():
    runtime = FakeRuntime()
    engine = engine_of(runtime)
    assert isinstance(engine, SharesPages)
    assert engine.page_store_stats() is None
    runtime.pages = PageStoreStats(num_saved=3)
    assert engine.page_store_stats() == runtime.pages
    await engine.close()


async def collect(engine, request):
    return [delta async for delta in engine.generate(request)]


def tokens(deltas):
    return [token for delta in deltas for token in delta.token_ids]


async def test_tokens_come_as_sglang_tells_them():
    runtime = FakeRuntime([item(4), item(5, 6, finish=LENGTH, cached_tokens=3)])
    engine = engine_of(runtime)
    deltas = await collect(engine, make_request("a", choice_index=1, max_tokens=3))
    assert [delta.token_ids for delta in deltas] == [(4,), (5, 6)]
    assert [delta.finish_reason for delta in deltas] == [None, FinishReason.LENGTH]
    assert {(delta.request_id, delta.choice_index) for delta in deltas} == {("a", 1)}
    usage = deltas[-1].usage
    assert (usage.num_prompt_tokens, usage.num_output_tokens, usage.num_cached_tokens) == (5, 3, 3)
    assert runtime.num_unfinished == 0
    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (5, 3)
    assert stats.num_local_cached_tokens == 3
    assert (stats.num_waiting, stats.num_total_pages, stats.num_free_pages) == (3, 10, 8)


async def test_what_drafts_did_is_told_of_the_request_and_of_the_engine():
    def runtime():
        last = item(6, finish=LENGTH, paceline=[[0, 0, 0, 0, 1]])
        return FakeRuntime([item(4), item(5, 5, paceline=[[3, 1, 1, 1, 0], None]), last])

    engine = engine_of(runtime())
    deltas = await collect(engine, make_request("a", max_tokens=4))
    assert deltas[-1].speculation.num_draft_tokens == 3
    assert deltas[-1].speculation.acceptance_histogram == (0, 1)
    assert engine.stats().speculation == deltas[-1].speculation


async def test_a_stop_string_ends_the_output_and_aborts_the_rest():
    runtime = FakeRuntime([item(3), item(0, 1, 7, 8)])
    deltas = await collect(engine_of(runtime), make_request(stop_strings=("ab",)))
    assert tokens(deltas) == [3, 0, 1]
    assert (deltas[-1].finish_reason, deltas[-1].stop_match) == (FinishReason.STOP, "ab")
    assert deltas[-1].usage.num_output_tokens == 3


async def test_the_token_behind_a_prompt_that_stands_alone_is_dropped():
    runtime = FakeRuntime([item(4, finish=LENGTH)])
    (delta,) = await collect(engine_of(runtime), make_request(max_tokens=0))
    assert runtime.arguments[0]["sampling_params"]["max_new_tokens"] == 1
    assert (delta.token_ids, delta.finish_reason) == ((), FinishReason.LENGTH)
    assert delta.usage.num_output_tokens == 0


async def test_leaving_the_stream_closes_sglangs():
    closed = []

    class Runtime(FakeRuntime):
        async def generate(self, arguments):
            try:
                async for entry in super().generate(arguments):
                    yield entry
            finally:
                closed.append(arguments["rid"])

    runtime = Runtime([item(3), item(4)])
    engine = engine_of(runtime)
    stream = engine.generate(make_request("a"))
    await anext(stream)
    await stream.aclose()
    assert closed == [runtime.arguments[0]["rid"]]
    await engine.drain(1)


async def test_a_stop_token_before_its_time_ends_nothing():
    runtime = FakeRuntime([item(2, 3, 2, 4)])
    request = make_request(ignore_eos=False, min_tokens=3)
    deltas = await collect(engine_of(runtime), request)
    assert tokens(deltas) == [2, 3, 2]
    assert (deltas[-1].finish_reason, deltas[-1].stop_match) == (FinishReason.STOP, 2)


async def test_stop_strings_may_begin_in_resumed_output():
    runtime = FakeRuntime([item(1, 9)])
    request = make_request(resumed_output_ids=(5, 0), stop_strings=("ab",))
    deltas = await collect(engine_of(runtime), request)
    assert tokens(deltas) == [1]
    assert deltas[-1].usage.num_output_tokens == 3


async def test_abort_ends_a_request_under_its_own_name_at_sglang():
    runtime = FakeRuntime([item(3)], [item(4)])
    engine = engine_of(runtime)
    first = asyncio.create_task(collect(engine, make_request("r1")))
    second = asyncio.create_task(collect(engine, make_request("r10")))
    await eventually(lambda: runtime.num_unfinished == 2)
    names = [arguments["rid"] for arguments in runtime.arguments]
    assert not names[0].startswith(names[1])
    assert not names[1].startswith(names[0])
    await eventually(lambda: engine.stats().num_output_tokens == 2)
    engine.abort("r1")
    engine.abort("never heard of")
    assert (await first)[-1].finish_reason is FinishReason.ABORT
    assert not second.done()
    engine.abort("r10")
    assert tokens(await second) == [4]


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ([item(finish=FULL)], EngineOverloadedError),
        ([ValueError("too long for this server")], RequestRejectedError),
    ],
)
async def test_errors_free_the_id(script, error):
    engine = engine_of(FakeRuntime(script, [item(3, finish=LENGTH)]))
    with pytest.raises(error):
        await collect(engine, make_request("a"))
    assert tokens(await collect(engine, make_request("a"))) == [3]


async def test_what_can_never_be_served_does_not_reach_sglang():
    runtime = FakeRuntime()
    engine = engine_of(runtime)
    for request in (
        make_request(prompt=[1] * 64),
        make_request(prompt=[100]),
        make_request(repetition_penalty=1.2),
    ):
        with pytest.raises(RequestRejectedError):
            await collect(engine, request)
    with pytest.raises(DeadlineExceededError):
        await collect(engine, make_request(deadline=time.time() - 1))
    assert runtime.arguments == []


async def test_an_id_can_run_only_once():
    engine = engine_of(FakeRuntime([item(3)]))
    stream = engine.generate(make_request("a"))
    await anext(stream)
    with pytest.raises(RequestRejectedError, match="id is running"):
        await collect(engine, make_request("a"))
    await stream.aclose()


async def test_the_deadline_ends_a_request():
    engine = engine_of(FakeRuntime([item(3)]))
    with pytest.raises(DeadlineExceededError):
        await collect(engine, make_request("a", deadline=time.time() + 0.05))
    await engine.drain(1)


async def test_a_dead_sglang_ends_every_request_with_an_error():
    runtime = FakeRuntime([item(3)])
    engine = engine_of(runtime)
    engine.check_health()
    running = asyncio.create_task(collect(engine, make_request("a")))
    await eventually(lambda: runtime.num_unfinished == 1)
    runtime.dead = "scheduler"
    with pytest.raises(EngineDeadError, match="scheduler has ended"):
        await running
    with pytest.raises(EngineDeadError):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        await collect(engine, make_request("b"))
    await engine.close()


async def test_a_death_while_nobody_waits_is_told_to_who_comes_back():
    runtime = FakeRuntime([item(3)])
    engine = engine_of(runtime)
    deltas = engine.generate(make_request("a"))
    assert (await anext(deltas)).token_ids == (3,)
    runtime.dead = "scheduler"
    with pytest.raises(EngineDeadError):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(anext(deltas), 10)
    await engine.close()


async def test_the_prompt_is_told_of_once():
    prompt = {"input_token_logprobs": [(None, 1, None), (-0.5, 2, None)]}
    runtime = FakeRuntime([item(**prompt), item(4, **prompt), item(5, finish=LENGTH, **prompt)])
    engine = engine_of(runtime)
    request = make_request("a", max_tokens=2, num_prompt_logprobs=0)
    told = [delta.prompt_logprobs for delta in await collect(engine, request)]
    assert [entry and entry.logprob for entry in told[0]] == [None, -0.5]
    assert told[1:] == [None]
    await engine.close()


async def test_health_notices_a_death_nobody_waited_for():
    runtime = FakeRuntime()
    engine = engine_of(runtime)
    runtime.dead = "detokenizer"
    with pytest.raises(EngineDeadError, match="detokenizer has ended"):
        engine.check_health()


async def test_draining_refuses_new_requests_and_lets_old_ones_end():
    runtime = FakeRuntime([item(3)])
    engine = engine_of(runtime)
    old = asyncio.create_task(collect(engine, make_request("a")))
    await eventually(lambda: runtime.num_unfinished == 1)
    drained = asyncio.create_task(engine.drain(60))
    await asyncio.sleep(0)
    with pytest.raises(EngineDrainingError):
        await collect(engine, make_request("b"))
    assert not drained.done()
    engine.abort("a")
    await drained
    assert (await old)[-1].finish_reason is FinishReason.ABORT


async def test_close_ends_what_runs_and_sglang():
    runtime = FakeRuntime([item(3)])
    engine = engine_of(runtime)
    stream = engine.generate(make_request("a"))
    await anext(stream)
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    await engine.close()
    with pytest.raises(EngineDeadError):
        await waiting
    assert runtime.is_closed
    await engine.close()
