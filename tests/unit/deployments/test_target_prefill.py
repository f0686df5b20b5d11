"""A target replica and a prefill replica around real engines: the text is that of one alone."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr
from ray.exceptions import ActorUnavailableError

from deployments import scaling_stats
from deployments import target as target_module
from deployments.config import PrefillConfig, TracingConfig
from deployments.engine.config import TorchEngineConfig
from deployments.engine.errors import EngineDrainingError
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.assembly import start_engine
from deployments.engine.types import FinishReason
from deployments.target import TargetReplica
from tests.fakes_engine import FakePageStore, expected, make_config, make_parts, make_request
from tests.fakes_metrics import Exporter, exporter_for
from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from deployments.engine.base import Engine
    from deployments.engine.types import GenerationRequest, Prefilled, TokenDelta

PROMPT = [(i * 7) % 60 for i in range(300)]
SETTINGS = PrefillConfig(min_tokens=64, timeout_s=60)


class Replica(TargetReplica):
    """Its engine has a model that can be predicted, and a tier that all replicas of a test use."""

    store: FakePageStore

    def _build_engine(self, *_: object) -> Engine:
        config = make_config()
        return start_engine(config, make_parts(config, NoSpeculation(), self.store))

    def __del__(self) -> None:
        """Not when it is collected: the hook is a coroutine, and the test awaits it."""


class Call:
    """A stream of a replica, read by a task of its own as a replica's calls are."""

    def __init__(self, items: AsyncIterator[str | Prefilled]) -> None:
        self._queue: asyncio.Queue[tuple[str | Prefilled, Exception | None]] = asyncio.Queue()
        self._task = asyncio.create_task(self._read(items))

    async def _read(self, items: AsyncIterator[str | Prefilled]) -> None:
        try:
            async for item in items:
                self._queue.put_nowait((item, None))
        except Exception as error:  # noqa: BLE001 - raised where the stream is read
            self._queue.put_nowait(("", error))
        else:
            self._queue.put_nowait(("", StopAsyncIteration()))

    async def __aiter__(self) -> AsyncIterator[str | Prefilled]:
        while True:
            item, error = await self._queue.get()
            if isinstance(error, StopAsyncIteration):
                return
            if error is not None:
                raise error
            yield item

    def cancel(self) -> None:
        self._task.cancel()


class Handle:
    """Calls one replica as Serve would, unless it is lost."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.is_lost = False
        self.asked: list[GenerationRequest] = []

    def options(self, **options: object) -> Handle:
        assert options == {"stream": True, "method_name": "prefill"}
        return self

    def remote(self, request: GenerationRequest) -> Call:
        self.asked.append(request)

        async def lost() -> AsyncIterator[str | Prefilled]:
            raise ActorUnavailableError("gone", None)
            yield "p1"

        return Call(lost() if self.is_lost else self._replica.prefill(request))


class Pools:
    """One replica of each pool, and what the target tells."""

    def __init__(
        self, target: Replica, prefill: Replica, handle: Handle, exporter: Exporter
    ) -> None:
        self.target = target
        self.prefill = prefill
        self.handle = handle
        self.exporter = exporter


@pytest.fixture
async def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Pools]:
    monkeypatch.setattr(target_module, "current_replica_id", lambda: "r1")
    store = FakePageStore()
    exporter_for(monkeypatch)
    async with started(tmp_path, store, None) as prefill:
        handle = Handle(prefill)
        exporter = exporter_for(monkeypatch)  # as in a process of its own
        async with started(tmp_path, store, handle) as target:
            yield Pools(target, prefill, handle, exporter)


@asynccontextmanager
async def started(
    folder: Path, store: FakePageStore, prefill: Handle | None
) -> AsyncIterator[Replica]:
    replica = Replica.__new__(Replica)
    replica.store = store
    await TargetReplica.__init__(
        replica,
        None,
        prefill,
        engine=TorchEngineConfig(model=str(write_tokenizer(folder / "model"))),
        cache_dir=folder,
        kv=None,
        pool_secret=SecretStr(""),
        tracing=TracingConfig(),
        prefill_config=SETTINGS,
    )
    try:
        yield replica
    finally:
        await TargetReplica.__del__(replica)


async def answer(replica: Replica, request: GenerationRequest) -> list[TokenDelta]:
    async with asyncio.timeout(120):
        return [delta async for deltas in replica.generate(request) for delta in deltas]


def text(deltas: list[TokenDelta]) -> tuple[int, ...]:
    return tuple(token for delta in deltas for token in delta.token_ids)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
async def test_a_prompt_is_computed_there_and_answered_here(
    pools: Pools, temperature: float
) -> None:
    request = make_request("a", PROMPT, temperature=temperature, seed=11)
    deltas = await answer(pools.target, request)
    assert text(deltas) == expected(request).token_ids
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.LENGTH]
    assert pools.target._engine.stats().num_tier_cached_tokens == 256
    usage = deltas[-1].usage
    assert usage is not None
    assert (usage.num_prompt_tokens, usage.num_output_tokens) == (300, 20)
    assert (usage.num_cached_tokens, usage.num_tier_cached_tokens) == (0, 0), "it was computed"
    again = await answer(pools.target, make_request("b", PROMPT))
    assert again[-1].usage is not None
    assert again[-1].usage.num_cached_tokens == 256
    assert len(pools.handle.asked) == 1
    told = pools.exporter.scrape()
    assert told["prefill_prompts_total", "sent"] == told["prefill_prompts_total", "cached"] == 1
    assert told["prefill_tokens_total",] == 256


async def test_the_prefill_replica_tells_the_same_figures_as_a_target(pools: Pools) -> None:
    await answer(pools.target, make_request("a", PROMPT))
    target = pools.target.record_autoscaling_stats()
    prefill = pools.prefill.record_autoscaling_stats()
    assert target.keys() == prefill.keys()
    assert prefill[scaling_stats.NUM_TTFTS] == 1


@pytest.mark.parametrize("dies", ["replica", "engine", "draining"])
async def test_a_pool_that_is_gone_costs_no_token(pools: Pools, dies: str) -> None:
    if dies == "replica":
        pools.handle.is_lost = True
    elif dies == "engine":
        await pools.prefill._engine.close()
    else:
        await pools.prefill._engine.drain(0)
    for number in range(5):
        request = make_request(str(number), [number, *PROMPT], seed=number, temperature=0.9)
        deltas = await answer(pools.target, request)
        assert text(deltas) == expected(request).token_ids
        assert sum(delta.finish_reason is not None for delta in deltas) == 1
    assert pools.target._engine.stats().num_tier_cached_tokens == 0
    assert len(pools.handle.asked) == 3, "then it is left alone for a while"


async def test_a_tier_that_lost_the_pages_meanwhile_is_a_miss(pools: Pools) -> None:
    real = pools.prefill.prefill

    async def prefill(request: GenerationRequest) -> AsyncIterator[str | Prefilled]:
        async for item in real(request):
            pools.prefill.store.pages.clear()
            yield item

    pools.prefill.prefill = prefill  # type: ignore[method-assign]
    request = make_request("a", PROMPT)
    deltas = await answer(pools.target, request)
    assert text(deltas) == expected(request).token_ids
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.num_cached_tokens == 0


async def test_many_at_once_and_each_ends_once(pools: Pools) -> None:
    requests = [
        make_request(str(number), [number % 3, *PROMPT], temperature=0.8, seed=number)
        for number in range(12)
    ]
    answers = await asyncio.gather(*(answer(pools.target, request) for request in requests))
    for request, deltas in zip(requests, answers, strict=True):
        assert text(deltas) == expected(request).token_ids
        assert sum(delta.finish_reason is not None for delta in deltas) == 1


async def test_who_leaves_while_the_pool_computes_leaves_nothing_there(pools: Pools) -> None:
    is_there, never = asyncio.Event(), asyncio.Event()
    is_cancelled = asyncio.Event()

    async def prefill(request: GenerationRequest) -> AsyncIterator[str | Prefilled]:
        yield "p1"
        is_there.set()
        try:
            await never.wait()
        finally:
            is_cancelled.set()

    pools.prefill.prefill = prefill  # type: ignore[method-assign]

    async def read() -> None:
        async with aclosing(pools.target.generate(make_request("a", PROMPT))) as deltas:
            async for _ in deltas:
                pass

    reader = asyncio.create_task(read())
    await asyncio.wait_for(is_there.wait(), 60)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await asyncio.wait_for(is_cancelled.wait(), 60)
    stats = pools.target._engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0), "it never came to the engine"


async def test_a_target_that_drains_sends_nothing_and_names_itself(pools: Pools) -> None:
    await pools.target._engine.drain(0)
    with pytest.raises(EngineDrainingError) as caught:
        await answer(pools.target, make_request("a", PROMPT))
    assert caught.value.replica_id == "r1"
    assert pools.handle.asked == []
