"""Prompts computed for other replicas: pages are dumped here and loaded there."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import asynccontextmanager

import pytest

from deployments.engine.base import Prefiller
from deployments.engine.errors import (
    DeadlineExceededError,
    EngineError,
    EngineOverloadedError,
    RequestRejectedError,
)
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.assembly import start_engine
from deployments.engine.types import Prefilled
from tests.fakes_async import eventually
from tests.fakes_engine import FakePageStore, expected, make_config, make_parts, make_request

PROMPT = [(i * 7) % 60 for i in range(300)]
"""Four full pages, and a part of one."""


@asynccontextmanager
async def engine(store, **sizes):
    config = make_config(**sizes)
    parts = make_parts(config, NoSpeculation(), store)
    running = start_engine(config, parts)
    try:
        yield running, parts.runner
    finally:
        await running.close()


async def generate(running, request):
    """Tokens and usage."""
    deltas = [delta async for delta in running.generate(request)]
    return tuple(token for delta in deltas for token in delta.token_ids), deltas[-1].usage


async def test_one_replica_dumps_and_another_loads():
    store = FakePageStore()
    request = make_request("a", PROMPT, temperature=0.9, seed=3)
    async with engine(store) as (prefiller, _), engine(store) as (target, runner):
        assert isinstance(prefiller, Prefiller)
        assert await target.count_cached(request, 1.0) == 0
        prefilled = await prefiller.prefill(request)
        assert prefilled == Prefilled(
            num_prompt_tokens=256, num_cached_tokens=0, num_shared_tokens=256
        )
        assert await target.count_cached(request, 1.0) == 256
        tokens, usage = await generate(target, request)
        assert tokens == expected(request).token_ids
        assert usage.num_tier_cached_tokens == 256
        assert sum(runner.batch_sizes) == 300 - 256 + 19


async def test_the_last_token_s_page_is_left_to_who_answers():
    store = FakePageStore()
    async with engine(store) as (prefiller, _):
        whole = await prefiller.prefill(make_request("a", PROMPT[:256]))
        assert whole.num_prompt_tokens == 192
        short = await prefiller.prefill(make_request("b", PROMPT[:64]))
        assert short == Prefilled(num_prompt_tokens=0)
    assert len(store.pages) == 3


async def test_a_resumed_text_is_a_prompt_as_a_whole():
    store = FakePageStore()
    request = make_request("a", PROMPT[:120], max_tokens=100)
    output = expected(request).token_ids
    resumed = make_request("a", PROMPT[:120], max_tokens=100, resumed_output_ids=output[:80])
    async with engine(store) as (prefiller, _), engine(store) as (target, _):
        assert (await prefiller.prefill(resumed)).num_shared_tokens == 192
        tokens, _ = await generate(target, resumed)
    assert tokens == output[80:]


@pytest.mark.parametrize("length", [256, 300, 321])
async def test_pages_that_the_tier_has_lost_are_written_again(length):
    prompt = [(i * 11) % 60 for i in range(length)]
    store = FakePageStore()
    async with engine(store) as (prefiller, _):
        first = await prefiller.prefill(make_request("a", prompt))
        keys = sorted(store.pages, key=lambda key: key.index)
        for key in keys[1:]:
            del store.pages[key]
        num_saves = store.num_saves
        again = await prefiller.prefill(make_request("b", prompt))
        assert again.num_shared_tokens == first.num_shared_tokens == 64 * len(keys)
        # The last page is computed again for its logits, and the first one is there.
        assert again.num_cached_tokens == first.num_shared_tokens - 64
        assert store.num_saves - num_saves == len(keys) - 1
        # What the tier has is not copied out at all.
        await prefiller.prefill(make_request("c", prompt))
        assert store.num_saves - num_saves == len(keys) - 1


async def test_other_requests_do_not_write_what_the_pool_had():
    store = FakePageStore()
    async with engine(store) as (running, _):
        await generate(running, make_request("a", PROMPT))
        store.pages.clear()
        await generate(running, make_request("b", PROMPT))
        assert not store.pages


async def test_what_is_in_the_pool_counts_before_the_tier():
    store = FakePageStore()
    async with engine(store) as (running, _):
        await generate(running, make_request("a", PROMPT[:200]))
        store.pages.clear()
        assert await running.count_cached(make_request("b", PROMPT), 1.0) == 192
        stranger = make_request("c", PROMPT, tenant_key=b"s" * 32)
        assert await running.count_cached(stranger, 1.0) == 0


async def test_without_a_tier_there_is_nothing_to_hand_over():
    async with engine(None) as (running, _):
        prefilled = await running.prefill(make_request("a", PROMPT))
        assert prefilled.num_shared_tokens == 0
        assert await running.count_cached(make_request("b", PROMPT), 1.0) == 256


async def test_a_cancelled_prefill_is_aborted():
    async with engine(FakePageStore()) as (running, runner):
        is_held, go_on = threading.Event(), threading.Event()

        def hold():
            is_held.set()
            assert go_on.wait(60)

        runner.before_forward = hold
        task = asyncio.create_task(running.prefill(make_request("a", PROMPT)))
        await eventually(is_held.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await eventually(lambda: running.stats().num_running == 0)
        assert running.stats().num_free_pages == running.stats().num_total_pages
        assert sum(runner.batch_sizes) < 256


async def test_an_aborted_prefill_is_an_error_and_not_a_part():
    async with engine(FakePageStore()) as (running, runner):
        is_held, go_on = threading.Event(), threading.Event()

        def hold():
            is_held.set()
            assert go_on.wait(60)

        runner.before_forward = hold
        task = asyncio.create_task(running.prefill(make_request("a", PROMPT)))
        await eventually(is_held.is_set)
        running.abort("a")
        go_on.set()
        with pytest.raises(EngineError, match="aborted"):
            await task


async def test_what_the_engine_refuses_is_refused_before_anything_is_looked_up():
    async with engine(FakePageStore(), max_waiting=1, max_num_seqs=1) as (running, runner):
        strange = make_request("a", [*PROMPT, -1])
        for ask in (running.prefill(strange), running.count_cached(strange, 1.0)):
            with pytest.raises(RequestRejectedError):
                await ask
        late = make_request("b", PROMPT, deadline=time.time() - 1)
        with pytest.raises(DeadlineExceededError):
            await running.prefill(late)
        go_on = threading.Event()
        runner.before_forward = lambda: go_on.wait(60)
        asked = [
            asyncio.create_task(running.prefill(make_request(str(i), PROMPT))) for i in range(5)
        ]
        try:
            done, _ = await asyncio.wait(asked, timeout=60, return_when=asyncio.FIRST_EXCEPTION)
            assert {type(task.exception()) for task in done} == {EngineOverloadedError}
        finally:
            go_on.set()
            await asyncio.wait(asked, timeout=60)
