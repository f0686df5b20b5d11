"""What every engine promises, run against every engine.

An engine joins by an entry in ``ENGINES``: a function from a few sizes to a running engine whose
model has at least 60 tokens. Nothing here knows what text a model gives.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deployments.engine.config import SimulatedConfig
from deployments.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    EngineOverloadedError,
    RequestRejectedError,
)
from deployments.engine.simulated_engine.start import start_simulated_engine
from deployments.engine.torch_engine.assembly import start_engine
from deployments.engine.types import FinishReason
from tests.fakes_async import eventually
from tests.fakes_engine import (
    FakePageStore,
    HostileSpeculator,
    detokenize,
    make_config,
    make_parts,
    make_request,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.base import Engine


def torch_engine(**sizes) -> Engine:
    config = make_config(**sizes)
    return start_engine(config, make_parts(config, HostileSpeculator(1), FakePageStore()))


def simulated_engine(**sizes) -> Engine:
    config = make_config(**sizes)
    simulated = SimulatedConfig(prefill_tokens_per_s=1e6, decode_step_s=((1, 1e-4),))
    config = config.model_copy(update={"kind": "simulated", "simulated": simulated})
    store = FakePageStore()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"vocab_size": 64, "max_position_embeddings": 4096, "eos_token_id": 63}
        (Path(folder) / "config.json").write_text(json.dumps(settings))
        return start_simulated_engine(
            config,
            Path(folder),
            page_store_factory=lambda _: store,
            speculator=HostileSpeculator(1),
            detokenize=detokenize,
        )


ENGINES: dict[str, Callable[..., Engine]] = {"torch": torch_engine, "simulated": simulated_engine}


@pytest.fixture(params=ENGINES)
def running(request):
    """Starts an engine of the given sizes, and closes it."""

    @asynccontextmanager
    async def start(**sizes):
        engine = ENGINES[request.param](**sizes)
        try:
            yield engine
        finally:
            await engine.close()

    return start


async def collect(engine, request):
    return [delta async for delta in engine.generate(request)]


async def collect_for_ever(engine, **changes):
    """Requests of the same kind, one after the other, until one fails."""
    while True:
        await collect(engine, long_request("for ever", **changes))


def text(deltas):
    return tuple(token for delta in deltas for token in delta.token_ids)


def logprobs(deltas):
    return [entry for delta in deltas for entry in delta.logprobs]


def long_request(name, **changes):
    return make_request(name, max_tokens=900, **changes)


async def test_deltas_end_with_exactly_one_terminal(running):
    async with running() as engine:
        request = make_request("a", max_tokens=30, choice_index=2)
        deltas = await collect(engine, request)
        assert all(delta.token_ids for delta in deltas[:-1])
        assert all(delta.finish_reason is None for delta in deltas[:-1])
        assert all((delta.request_id, delta.choice_index) == ("a", 2) for delta in deltas)
        last = deltas[-1]
        assert last.finish_reason is FinishReason.LENGTH
        assert len(text(deltas)) == 30
        assert last.usage.num_prompt_tokens == 5
        assert last.usage.num_output_tokens == 30
        assert last.speculation is not None


async def test_many_requests_at_once_give_the_text_each_gives_alone(running):
    requests = [
        make_request(f"r{i}", [1 + i] * (1 + 30 * i), max_tokens=25, temperature=i % 2)
        for i in range(8)
    ]
    async with running() as engine:
        together = await asyncio.gather(*(collect(engine, request) for request in requests))
        for request, deltas in zip(requests, together, strict=True):
            alone = await collect(engine, replace(request, speculation=False))
            assert text(alone) == text(deltas)


async def test_resumed_request_delivers_only_what_is_new(running):
    request = make_request("a", max_tokens=30, temperature=1.0)
    async with running() as engine:
        whole = text(await collect(engine, request))
        rest = await collect(engine, replace(request, resumed_output_ids=whole[:11]))
        assert text(rest) == whole[11:]
        assert rest[-1].usage.num_output_tokens == 30


async def test_a_request_for_no_tokens_ends_behind_its_prompt(running):
    async with running() as engine:
        (delta,) = await collect(engine, make_request("a", [3, 1, 4] * 90, max_tokens=0))
        assert (delta.token_ids, delta.finish_reason) == ((), FinishReason.LENGTH)
        assert delta.usage.num_prompt_tokens == 270
        assert delta.usage.num_output_tokens == 0


@pytest.mark.parametrize("running", ["torch"], indirect=True)
async def test_logprobs_come_with_their_tokens(running):
    prompt = [3, 1, 4, 1, 5] * 30
    request = make_request("a", prompt, max_tokens=30, num_logprobs=2, num_prompt_logprobs=0)
    async with running() as engine:
        await collect(engine, make_request("same prompt", prompt))
        deltas = await collect(engine, request)
        told = logprobs(deltas)
        assert [entry.token_id for entry in told] == list(text(deltas))
        assert all(entry.logprob <= 0 and entry.rank >= 1 for entry in told)
        assert all(entry.top[0][1] >= entry.top[1][1] for entry in told)
        assert all(entry.top[0][1] == entry.logprob for entry in told if entry.rank == 1)
        of_prompt = deltas[0].prompt_logprobs
        assert of_prompt[0] is None
        assert [entry.token_id for entry in of_prompt[1:]] == prompt[1:]
        assert all(delta.prompt_logprobs is None for delta in deltas[1:])
        (alone,) = await collect(
            engine, replace(request, sampling=replace(request.sampling, max_tokens=0))
        )
        assert alone.prompt_logprobs == of_prompt
        plain = await collect(engine, replace(request, speculation=False))
        rest = await collect(engine, replace(request, resumed_output_ids=text(deltas)[:11]))
        assert all(delta.prompt_logprobs is None for delta in rest)
        for other in (logprobs(plain), told[:11] + logprobs(rest)):
            assert [entry.logprob for entry in other] == pytest.approx(
                [entry.logprob for entry in told], abs=1e-3
            )


async def test_abort_ends_a_running_request(running):
    async with running() as engine:
        stream = engine.generate(long_request("a"))
        await anext(stream)
        engine.abort("a")
        engine.abort("never heard of")
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason is FinishReason.ABORT
        assert deltas[-1].usage.num_output_tokens < 900


async def test_closing_the_iterator_frees_everything(running):
    async with running() as engine:
        stream = engine.generate(long_request("a"))
        await anext(stream)
        await stream.aclose()
        await eventually(lambda: engine.stats().num_running == 0)
        stats = engine.stats()
        assert stats.num_free_pages == stats.num_total_pages
        assert stats.num_output_tokens < 900
        # The id is free again at once.
        assert text(await collect(engine, make_request("a")))


async def test_cancelling_the_reader_frees_everything(running):
    async with running() as engine:
        task = asyncio.create_task(collect(engine, long_request("a")))
        await eventually(lambda: engine.stats().num_running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await eventually(lambda: engine.stats().num_running == 0)


async def test_impossible_requests_are_refused_at_once(running):
    async with running(max_model_len=128) as engine:
        with pytest.raises(RequestRejectedError, match="maximum context length is 128"):
            await collect(engine, make_request("a", [1] * 128))
        with pytest.raises(RequestRejectedError, match="out of range"):
            await collect(engine, make_request("b", [1_000_000]))
        assert len(text(await collect(engine, make_request("c", [1] * 120)))) == 8


async def test_an_id_can_run_only_once(running):
    async with running() as engine:
        stream = engine.generate(long_request("a"))
        await anext(stream)
        with pytest.raises(RequestRejectedError):
            await collect(engine, make_request("a"))
        await stream.aclose()


async def test_full_queue_refuses_and_recovers(running):
    async with running(max_num_seqs=1, max_waiting=1) as engine:
        running_one = engine.generate(long_request("a"))
        await anext(running_one)
        waiting = asyncio.create_task(collect(engine, make_request("b")))
        await eventually(lambda: engine.stats().num_waiting == 1)
        with pytest.raises(EngineOverloadedError) as caught:
            await collect(engine, make_request("c"))
        assert caught.value.retry_after_s > 0
        assert pickle.loads(pickle.dumps(caught.value)).retry_after_s > 0  # noqa: S301
        await running_one.aclose()
        assert text(await waiting)
        assert text(await collect(engine, make_request("d")))


async def test_deadline_ends_a_request(running):
    async with running() as engine:
        with pytest.raises(DeadlineExceededError):
            await collect(engine, make_request("a", deadline=time.time() - 1))
        with pytest.raises(DeadlineExceededError):
            await collect_for_ever(engine, deadline=time.time() + 0.05)
        await eventually(lambda: engine.stats().num_running == 0)


async def test_drain_refuses_new_requests_and_lets_old_ones_end(running):
    async with running() as engine:
        old = asyncio.create_task(collect(engine, long_request("a")))
        await eventually(lambda: engine.stats().num_running == 1)
        drained = asyncio.create_task(engine.drain(timeout_s=60.0))
        await asyncio.sleep(0)
        with pytest.raises(EngineDrainingError):
            await collect(engine, make_request("b"))
        await drained
        assert (await old)[-1].finish_reason is FinishReason.LENGTH


async def test_drain_gives_up_in_time(running):
    async with running() as engine:
        stream = engine.generate(long_request("a"))
        await anext(stream)
        await engine.drain(timeout_s=0.01)
        await stream.aclose()


async def test_close_ends_open_requests_with_an_error(running):
    async with running() as engine:
        stream = engine.generate(long_request("a"))
        await anext(stream)
        await engine.close()
        with pytest.raises(EngineDeadError):
            [delta async for delta in stream]
        with pytest.raises(EngineDeadError):
            await collect(engine, make_request("b"))
        await engine.close()


async def test_health_and_counters(running):
    async with running() as engine:
        engine.check_health()
        assert engine.stats().num_total_pages > 0
        await collect(engine, make_request("a"))
        stats = engine.stats()
        assert (stats.num_prompt_tokens, stats.num_output_tokens) == (5, 20)
        assert stats.num_steps > 0
        assert stats.step_time_ewma_s > 0
        await engine.close()
        with pytest.raises(EngineDeadError):
            engine.check_health()
