"""The engine's thread: how it dies, what it owns, and what a slow reader sees."""

from __future__ import annotations

import asyncio
import threading

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.engine.errors import EngineDeadError, EngineOverloadedError
from deployments.engine.torch_engine import engine as engine_module
from deployments.engine.torch_engine.assembly import start_engine
from deployments.engine.types import FinishReason
from tests.fakes_async import eventually
from tests.fakes_engine import (
    FakePageStore,
    OracleSpeculator,
    expected,
    make_config,
    make_parts,
    make_request,
)


@pytest.fixture
async def parts_and_engine():
    config = make_config(max_num_seqs=2, max_waiting=2)
    parts = make_parts(config, OracleSpeculator(), FakePageStore())
    engine = start_engine(config, parts)
    yield parts, engine
    await engine.close()


async def collect(engine, request):
    return [delta async for delta in engine.generate(request)]


def hold(runner):
    """Stop the engine thread at its next forward; returns (it has stopped, let it go on)."""
    is_held, go_on = threading.Event(), threading.Event()

    def wait():
        is_held.set()
        assert go_on.wait(20)

    runner.before_forward = wait
    return is_held, go_on


async def test_crash_ends_every_request_and_the_engine(parts_and_engine):
    parts, engine = parts_and_engine
    parts.runner.crash_at = 5
    requests = [make_request(f"r{i}", max_tokens=300) for i in range(4)]
    results = await asyncio.gather(
        *(collect(engine, request) for request in requests), return_exceptions=True
    )
    assert all(isinstance(result, EngineDeadError) for result in results)
    with pytest.raises(EngineDeadError, match="ArithmeticError"):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        await collect(engine, make_request("later"))


async def test_tokens_before_a_crash_are_delivered(parts_and_engine):
    parts, engine = parts_and_engine
    parts.runner.crash_at = 3
    request = make_request(max_tokens=300)
    got = []

    async def read():
        async for delta in engine.generate(request):
            got.extend(delta.token_ids)

    with pytest.raises(EngineDeadError):
        await read()
    # One token from the prefill, five from the step with a right draft of four.
    assert tuple(got) == expected(request).token_ids[:6]


async def test_close_stops_everything_the_engine_owns(parts_and_engine):
    parts, engine = parts_and_engine
    await engine.close()
    assert parts.speculator.is_shut_down
    assert parts.store.is_closed
    assert not engine._thread.is_alive()


async def test_hung_step_fails_the_health_check(parts_and_engine, monkeypatch):
    parts, engine = parts_and_engine
    is_held, go_on = hold(parts.runner)
    task = asyncio.create_task(collect(engine, make_request()))
    await eventually(is_held.is_set)
    engine.check_health()
    monkeypatch.setattr(engine_module, "_HANGS_AFTER_S", 0.0)
    with pytest.raises(EngineDeadError, match="has not ended"):
        engine.check_health()
    go_on.set()
    await task
    await eventually(lambda: engine._step_began_at is None)
    engine.check_health()


async def test_mailbox_is_bounded_while_a_step_runs(parts_and_engine):
    parts, engine = parts_and_engine
    is_held, go_on = hold(parts.runner)
    tasks = [asyncio.create_task(collect(engine, make_request("first")))]
    await eventually(is_held.is_set)
    tasks += [asyncio.create_task(collect(engine, make_request(f"r{i}"))) for i in range(6)]
    await eventually(lambda: sum(task.done() for task in tasks) == 2)
    go_on.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [isinstance(result, EngineOverloadedError) for result in results]
    # Two run and two wait; two more did not fit into the mailbox, one not into the queue.
    assert sum(refused) == 3
    assert all(result[-1].finish_reason is FinishReason.LENGTH for result in results[:4])


async def test_slow_reader_gets_longer_deltas(parts_and_engine):
    _, engine = parts_and_engine
    request = make_request(max_tokens=60)
    stream = engine.generate(request)
    first = await anext(stream)
    (unread,) = engine._streams.values()
    await eventually(lambda: unread._unread is not None and unread._unread.usage is not None)
    rest = [delta async for delta in stream]
    assert first.token_ids + rest[0].token_ids == expected(request).token_ids
    assert len(rest) == 1
    assert rest[0].finish_reason is FinishReason.LENGTH


async def test_load_that_ends_wakes_the_idle_engine(parts_and_engine):
    parts, engine = parts_and_engine
    prompt = [4] * 200
    await collect(engine, make_request("a", prompt, tenant_key=b"x" * 32))
    parts.store.answer = "held"
    task = asyncio.create_task(collect(engine, make_request("b", prompt)))
    await eventually(lambda: bool(parts.store.pending))
    await eventually(lambda: engine._step_began_at is None)
    parts.store.release_loads()
    assert (await task)[-1].finish_reason is FinishReason.LENGTH


async def test_one_span_per_request_under_the_callers_trace(parts_and_engine, monkeypatch):
    _, engine = parts_and_engine
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(engine_module, "tracer", provider.get_tracer("test"))
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    await collect(engine, make_request(traceparent=f"00-{trace_id}-{parent_id}-01"))
    (span,) = exporter.get_finished_spans()
    assert span.name == "engine.generate"
    assert trace.format_trace_id(span.context.trace_id) == trace_id
    assert trace.format_span_id(span.parent.span_id) == parent_id
    assert [event.name for event in span.events] == ["first token"]
    assert span.attributes["gen_ai.usage.input_tokens"] == 5
    assert span.attributes["gen_ai.usage.output_tokens"] == 20
