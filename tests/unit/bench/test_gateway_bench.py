"""The gateway benchmark's own logic: an engine without delay, its clients, and the bars."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import psutil
import pytest

from cluster.load.surfaces import BrokenError
from cluster.load.workload import LoadRequest
from tests.bench.gateway.bars import BARE, DEFAULT, PACELINE, hold_bars
from tests.bench.gateway.clients import Direct, Http
from tests.bench.gateway.engine import InstantEngine
from tests.bench.gateway.measure import Plan, Way, measure
from tests.bench.gateway.pausing import Turns
from tests.bench.gateway.processor_time import ProcessorTime


def _way(p50: float, p99: float, item: float | None = None, num_failed: int = 0) -> dict[str, Any]:
    return {"first_ms": {"p50": p50, "p99": p99}, "item_ms": item, "num_failed": num_failed}


def _ways(**changed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    ways = {}
    for surface in ("HTTP", "gRPC"):
        for kind, item in (("whole", None), ("streamed", 0.1)):
            ways[f"{BARE}, {surface}, {kind}"] = _way(0.1, 0.2, None if item is None else 0.01)
            ways[f"{PACELINE}, {surface}, {kind}"] = _way(1.6, 5.2, item)
            ways[f"{DEFAULT}, {surface}, {kind}"] = _way(4.1, 9.0, item)
    return ways | changed


def test_bars_are_about_what_is_added_to_the_engine():
    bars = hold_bars(_ways())
    assert all(bar["holds"] for bar in bars.values())
    assert bars["HTTP, whole: p50 over the engine, ms"]["value"] == pytest.approx(1.5)
    assert bars["gRPC, streamed: p99 over the engine, ms"]["value"] == pytest.approx(5.0)
    assert bars[f"gRPC, whole: {DEFAULT}'s p50 over ours"]["value"] == pytest.approx(4.0 / 1.5)
    assert bars["gRPC: an item over the engine, ms"]["value"] == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("way", "failing"),
    [
        (_way(2.2, 5.0, 0.1), ["p50 over the engine", "p50 over ours"]),
        (_way(1.6, 15.3, 0.1), ["p99"]),
        (_way(1.6, 5.0, 0.12), ["an item"]),
        (_way(1.6, 5.0, 0.1, num_failed=1), ["failed requests"]),
    ],
)
def test_each_bar_can_fail(way, failing):
    bars = hold_bars(_ways(**{f"{PACELINE}, HTTP, streamed": way}))
    failed = [name for name, bar in bars.items() if not bar["holds"]]
    assert len(failed) == len(failing)
    assert all(part in name for part, name in zip(failing, failed, strict=True))


async def test_the_engine_gives_as_many_tokens_as_are_asked_for():
    surface = Direct("direct", InstantEngine(7), (1, 2, 3))
    request = LoadRequest(at_s=0, prompt="", max_tokens=5, ignore_eos=True)
    pieces = [piece async for piece in surface.ask(request, 1.0)]
    assert len(pieces) == 5
    assert [piece.counts is not None for piece in pieces] == [False] * 4 + [True]


PARTS = (
    b'data: {"delta":{"content":""}}\n\ndata: {"del',
    b'ta":{"content":"a"}}\n\ndata: {"delta":{"content":"a"}}\n\n',
    b"",
)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(
    b"%x\r\n%b\r\n" % (len(part), part) for part in PARTS
)
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
REFUSED = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


async def _ask(answer: bytes, num_requests: int, *, stream: bool) -> tuple[int, list[int]]:
    """Connections made, and pieces with text of each request."""
    num_connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length))
                writer.write(answer)
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = Http("http", f"http://127.0.0.1:{port}", "m", stream=stream)
    request = LoadRequest(at_s=0, prompt="why?", max_tokens=2, ignore_eos=True)
    found = []
    try:
        for _ in range(num_requests):
            pieces = [piece async for piece in client.ask(request, 1.0)]
            assert pieces[-1].counts is not None
            found.append(sum(piece.has_text for piece in pieces))
    finally:
        await client.close()
        server.close()
        await server.wait_closed()
    return num_connections, found


@pytest.mark.parametrize(
    ("answer", "stream", "num_pieces"), [(CHUNKED, True, 2), (WHOLE, False, 1)]
)
async def test_a_connection_is_kept_from_answer_to_answer(answer, stream, num_pieces):
    assert await _ask(answer, 3, stream=stream) == (1, [num_pieces] * 3)


async def test_an_answer_of_another_status_is_an_error():
    with pytest.raises(BrokenError, match="503"):
        await _ask(REFUSED, 1, stream=False)


async def test_everybody_is_asked_in_every_round():
    def way(name: str, *, streams: bool) -> Way:
        surface = Direct(name, InstantEngine(7), (1,))
        return Way(surface=surface, streams=streams, processor_time=ProcessorTime())

    plan = Plan(rounds=2, rate=200.0, seconds=0.2, num_streams=3, num_items=8)
    turns = []
    ways = {"a": way("a", streams=True), "b": replace(way("b", streams=False), pid=7)}
    rows = await measure(ways, plan, turns.append)
    assert turns == [None, 7] * 3
    assert len(rows["a"].first_s) == len(rows["b"].first_s) > 0
    assert len(rows["a"].whole_s) == len(rows["a"].first_s)
    assert (len(rows["a"].item_s), len(rows["b"].item_s)) == (6, 0)
    assert not rows["a"].errors


def test_all_but_one_stand_still_and_go_on_at_the_end(monkeypatch):
    monkeypatch.setattr("tests.bench.gateway.pausing._SETTLES_S", 0.0)
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    ours = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(2)]

    def become(*expected: bool) -> bool:
        """Signals take a moment."""
        deadline = time.monotonic() + 10
        found = None
        while found != expected and time.monotonic() < deadline:
            states = [psutil.Process(each.pid).status() for each in ours]
            found = tuple(state == psutil.STATUS_STOPPED for state in states)
        return found == expected

    try:
        with Turns([each.pid for each in ours]) as turns:
            turns.give(ours[0].pid)
            assert become(False, True)
            for _ in range(2):
                turns.give(ours[1].pid)
                assert become(True, False)
            turns.give(None)
            assert become(True, True)
            turns.give(ours[0].pid)
            assert become(False, True)
        assert become(False, False)
    finally:
        for each in ours:
            each.communicate()
