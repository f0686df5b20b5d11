"""Direct streams between both ends of a real connection."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from deployments.engine.errors import EngineOverloadedError, RequestRejectedError
from deployments.engine.types import FinishReason, GenerationRequest, SamplingParams, TokenDelta
from deployments.token_link import LinkLostError, TokenLink
from deployments.token_server import ENDPOINT_KEY, KEY_KEY, TokenServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from deployments.token_link import TokenStream

PATIENCE_S = 60.0
MANY = 20_000


class Engine:
    """Counts from 1; waits for a permit before every token of a request called ``slow``."""

    def __init__(self) -> None:
        self.permits = asyncio.Semaphore(0)
        self.aborted: list[str] = []
        self.error: Exception | None = None
        self.forgets_its_end = False

    async def deltas(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        last = request.sampling.max_tokens
        is_finished = False
        try:
            for token in range(1, last + 1):
                if request.request_id == "slow":
                    await self.permits.acquire()
                else:
                    await asyncio.sleep(0)
                if self.error is not None:
                    raise self.error
                is_finished = token == last and not self.forgets_its_end
                yield TokenDelta(
                    request_id=request.request_id,
                    token_ids=(token,),
                    choice_index=request.choice_index,
                    finish_reason=FinishReason.LENGTH if is_finished else None,
                )
        finally:
            if not is_finished:
                self.aborted.append(request.request_id)


def request(name: str = "fast", max_tokens: int = 5) -> GenerationRequest:
    return GenerationRequest(
        request_id=name,
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(max_tokens=max_tokens, seed=1),
        choice_index=3,
    )


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a condition of the other end
            await asyncio.sleep(0.001)


@asynccontextmanager
async def served(engine: Engine) -> AsyncIterator[tuple[TokenServer, TokenLink]]:
    server = TokenServer(engine.deltas, "replica")
    await server.start("127.0.0.1")
    try:
        link = TokenLink.of(server.metadata())
        assert link is not None
        await until(link.is_open)
        yield server, link
    finally:
        await server.close()


async def everything(stream: TokenStream) -> list[tuple[TokenDelta, ...]]:
    arrivals = []
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                arrivals.append(await stream.take())
            except StopAsyncIteration:
                return arrivals


def tokens(arrivals: list[tuple[TokenDelta, ...]]) -> list[int]:
    return [token for deltas in arrivals for delta in deltas for token in delta.token_ids]


async def test_a_stream_names_its_replica_and_comes_whole() -> None:
    async with served(Engine()) as (_, link):
        stream = link.start(request(), 8)
        admission = await stream.admission
        assert (admission.is_accepted, admission.num_running) == (True, 1)
        deltas = [delta for together in await everything(stream) for delta in together]
        assert deltas[0].token_ids == ()
        assert [delta.token_ids for delta in deltas[1:]] == [(1,), (2,), (3,), (4,), (5,)]
        assert {delta.replica_id for delta in deltas} == {"replica"}
        assert {(delta.request_id, delta.choice_index) for delta in deltas} == {("fast", 3)}
        assert [delta.finish_reason for delta in deltas[-2:]] == [None, FinishReason.LENGTH]


async def test_what_an_engine_says_at_once_wakes_its_caller_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with served(Engine()) as (server, link):
        await until(lambda: len(server._connections) == 1)
        [connection] = server._connections
        written: list[bytes] = []
        write = connection._write
        monkeypatch.setattr(connection, "_write", lambda data: (written.append(data), write(data)))
        stream = link.start(request(), 8)
        assert tokens(await everything(stream)) == [1, 2, 3, 4, 5]
        assert [line[:1] for line in written[0].splitlines()] == [b"a", b"d"]


async def test_streams_of_one_connection_do_not_mix() -> None:
    async with served(Engine()) as (server, link):
        streams = [link.start(request(max_tokens=count), 64) for count in range(1, 40)]
        for count, stream in enumerate(streams, 1):
            assert tokens(await everything(stream)) == list(range(1, count + 1))
        await until(lambda: server.num_running == 0)
        assert link.num_open == 0


async def test_a_reader_that_is_behind_gets_all_at_once() -> None:
    engine = Engine()
    async with served(engine) as (server, link):
        stream = link.start(request("slow", 6), 8)
        assert (await stream.take())[0].replica_id == "replica"
        for _ in range(6):
            engine.permits.release()
        await until(lambda: server.num_running == 0 and link.num_open == 0)
        assert [len(together) for together in await everything(stream)] == [6]


async def test_a_slow_stream_holds_up_no_other_one() -> None:
    engine = Engine()
    async with served(engine) as (_, link):
        slow = link.start(request("slow", 1), 8)
        assert tokens(await everything(link.start(request(max_tokens=MANY), 8))) == list(
            range(1, MANY + 1)
        )
        engine.permits.release()
        assert tokens(await everything(slow)) == [1]


async def test_a_full_replica_refuses() -> None:
    engine = Engine()
    async with served(engine) as (server, link):
        first = link.start(request("slow", 1), 1)
        assert (await first.admission).is_accepted
        second = await link.start(request(), 1).admission
        assert (second.is_accepted, second.num_running) == (False, 1)
        engine.permits.release()
        assert tokens(await everything(first)) == [1]
        await until(lambda: server.num_running == 0)
        assert (await link.start(request(), 1).admission).is_accepted


async def test_a_replica_that_is_being_stopped_looks_full_and_ends_what_it_runs() -> None:
    engine = Engine()
    async with served(engine) as (server, link):
        first = link.start(request("slow", 1), 8)
        assert (await first.admission).is_accepted
        server.is_refusing = True
        second = await link.start(request(), 8).admission
        assert (second.is_accepted, second.num_running) == (False, 8)
        engine.permits.release()
        assert tokens(await everything(first)) == [1]


async def test_cancelling_ends_the_sequence_at_the_replica() -> None:
    engine = Engine()
    ended: list[str] = []
    async with served(engine) as (server, link):
        stream = link.start(request("slow", 3), 8)
        stream.on_end(lambda: ended.append("cancelled"))
        engine.permits.release()
        while not tokens([await stream.take()]):
            pass
        stream.cancel()
        stream.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stream.take()
        await until(lambda: engine.aborted == ["slow"] and server.num_running == 0)
        assert ended == ["cancelled"]
        assert tokens(await everything(link.start(request(), 1))) == [1, 2, 3, 4, 5]


async def test_a_caller_that_leaves_before_it_is_admitted_breaks_nothing() -> None:
    engine = Engine()
    async with served(engine) as (_, link):
        left = link.start(request("slow", 1), 8)
        left.admission.cancel()
        assert tokens(await everything(link.start(request(), 8))) == [1, 2, 3, 4, 5]
        left.cancel()
        await until(lambda: link.num_open == 0)
        assert tokens(await everything(link.start(request(), 8))) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RequestRejectedError("too long", "prompt"), RequestRejectedError),
        (EngineOverloadedError("full", 3.0), EngineOverloadedError),
        (KeyError("bug"), RuntimeError),
    ],
    ids=repr,
)
async def test_errors_arrive_behind_what_came_before(
    raised: Exception, seen: type[Exception]
) -> None:
    engine = Engine()
    ended: list[str] = []
    async with served(engine) as (server, link):
        stream = link.start(request("slow", 3), 8)
        stream.on_end(lambda: ended.append("failed"))
        engine.permits.release()
        while not tokens([await stream.take()]):
            pass
        engine.error = raised
        engine.permits.release()
        with pytest.raises(seen):
            await everything(stream)
        await until(lambda: server.num_running == 0)
        assert ended == ["failed"]


async def test_a_stream_without_an_end_is_an_error() -> None:
    engine = Engine()
    engine.forgets_its_end = True
    async with served(engine) as (_, link):
        with pytest.raises(RuntimeError, match="no end"):
            await everything(link.start(request(), 8))


async def test_a_server_that_stops_loses_its_streams_and_their_sequences() -> None:
    engine = Engine()
    async with served(engine) as (server, link):
        stream = link.start(request("slow", 3), 8)
        assert (await stream.admission).is_accepted
        await server.close()
        with pytest.raises(LinkLostError):
            await everything(stream)
        assert engine.aborted == ["slow"]
        await until(lambda: not link.is_open())
        with pytest.raises(LinkLostError):
            link.start(request(), 8)


async def test_an_ingress_that_goes_ends_its_sequences() -> None:
    engine = Engine()
    async with served(engine) as (server, link):
        assert (await link.start(request("slow", 3), 8).admission).is_accepted
        link._connection.abort()
        await until(lambda: engine.aborted == ["slow"] and server.num_running == 0)


async def test_a_link_dials_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.token_link._REDIAL_PAUSE_S", 0.0)
    async with served(Engine()) as (_, link):
        link._connection.abort()
        await until(lambda: not link.is_open())
        await until(link.is_open)
        assert tokens(await everything(link.start(request(), 8))) == [1, 2, 3, 4, 5]


async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(Engine()) as (server, link):
        monkeypatch.setattr("deployments.token_server._MAX_CONNECTIONS", 1)
        second = TokenLink.of(server.metadata())
        assert second is not None
        await until(lambda: second._dialling is None)
        assert not second.is_open()
        assert link.is_open()


async def test_nobody_gets_in_without_the_key() -> None:
    engine = Engine()
    async with served(engine) as (server, _):
        link = TokenLink(server.metadata()[ENDPOINT_KEY], "wrong")
        await until(lambda: link._dialling is None)
        assert not link.is_open()


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"c[1]\n", b"h[1]\n", b"x" * 5000, b"\n"], ids=repr
)
async def test_strangers_are_cut_off(said: bytes) -> None:
    async with served(Engine()) as (server, _):
        host, _, port = server.metadata()[ENDPOINT_KEY].partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(said)
        async with asyncio.timeout(PATIENCE_S):
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()


def test_a_replica_that_publishes_nothing_has_no_link() -> None:
    assert TokenLink.of({}) is None
    assert TokenLink.of({ENDPOINT_KEY: "", KEY_KEY: "k"}) is None
    assert TokenLink.of({"draft_endpoint": "1.2.3.4:5"}) is None
