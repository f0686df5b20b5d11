"""The load test's own logic: a closed loop, what aiperf is asked and tells, and the bars."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from cluster.load.outcome import Outcome
from cluster.load.surfaces import Counts, Piece
from cluster.load.workload import LoadRequest
from tests.bench.loadtest import aiperf
from tests.bench.loadtest.bars import hold_bars
from tests.bench.loadtest.capacity import find_capacity
from tests.bench.loadtest.wire import AnswerClock, Timed, wire

if TYPE_CHECKING:
    from pathlib import Path

REQUEST = LoadRequest(at_s=0.5, prompt="why?", max_tokens=5, ignore_eos=True)
ANSWER = Counts(num_prompt_tokens=3, num_output_tokens=5, num_cached_tokens=0)


class Server:
    """Answers after a while, and counts who is with it."""

    name = "server"

    def __init__(self) -> None:
        self.num_open = self.most_open = 0

    async def ask(self, request, timeout_s):
        del request, timeout_s
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await asyncio.sleep(0.01)
        yield Piece(has_text=True)
        self.num_open -= 1
        yield Piece(has_text=False, counts=ANSWER)

    async def close(self):
        pass


async def test_a_closed_loop_keeps_its_clients_busy():
    server = Server()
    found = await find_capacity(server, [REQUEST], num_clients=3, warm_s=0.05, seconds=0.5)
    assert server.most_open == 3
    assert server.num_open == 0
    assert 0 < found.requests_per_s < 1.2 * 3 / 0.01
    assert found.output_tokens_per_s == pytest.approx(5 * found.requests_per_s)


def _outcome(sent_s: float, ending: str = "complete") -> Outcome:
    return Outcome(
        index=0,
        surface="http",
        due_s=sent_s - 0.1,
        sent_s=sent_s,
        event_s=[sent_s + 0.2, sent_s + 0.3, sent_s + 0.6],
        ended_s=sent_s + 1.0,
        num_output_tokens=5,
        ending=ending,
        error=None if ending == "complete" else "gone",
    )


def test_our_figures_are_counted_as_aiperf_counts():
    told = aiperf.as_aiperf_counts([_outcome(1.0), _outcome(4.0)])
    assert list(told) == list(aiperf.MEASURES)
    # The run ends with the last text, 3.6 s from its first request.
    assert list(told.values()) == pytest.approx([2 / 3.6, 10 / 3.6, 200, 600, 100])
    with pytest.raises(RuntimeError, match="1 of 2 requests failed: gone"):
        aiperf.as_aiperf_counts([_outcome(1.0), _outcome(4.0, "failed")])


TOOL = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in
    --artifact-dir) folder=$2 ;;
    --input-file) asked=$2 ;;
  esac
  shift
done
count=$(wc -l < "$asked")
printf '{"request_count": {"avg": %s}, "request_throughput": {"avg": 2}, \
"output_token_throughput": {"avg": 10}, "time_to_first_token": {"avg": 200}, \
"request_latency": {"avg": 600}, "inter_token_latency": {"avg": 100}}' "${ANSWERS:-$count}" \
  > "$folder/profile_export_aiperf.json"
exit "${CODE:-0}"
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> aiperf.AiPerf:
    """A command that answers as aiperf does."""
    command = tmp_path / "bin" / "aiperf"
    command.parent.mkdir()
    command.write_text(TOOL)
    command.chmod(0o755)
    monkeypatch.setattr(aiperf, "environment", lambda *_: command.parent / "python")
    return aiperf.AiPerf(tmp_path / "reports", tmp_path)


def test_aiperf_is_asked_for_the_same_requests_at_the_same_times(tool, tmp_path):
    told = tool.run("http://127.0.0.1:1", "model", [REQUEST, REQUEST])
    assert told == dict(zip(aiperf.MEASURES, [2, 10, 200, 600, 100], strict=True))
    lines = (tmp_path / "reports" / "asked.jsonl").read_text().splitlines()
    asked = [json.loads(line) for line in lines]
    assert asked[0]["timestamp"] == 500
    assert asked[0]["payload"]["messages"] == [{"role": "user", "content": "why?"}]
    assert (asked[0]["payload"]["max_tokens"], asked[0]["payload"]["ignore_eos"]) == (5, True)


@pytest.mark.parametrize(
    ("variable", "value", "said"), [("CODE", "3", "ended with 3"), ("ANSWERS", "1", "has 1 of 2")]
)
def test_an_aiperf_that_fails_is_not_compared(tool, monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    with pytest.raises(RuntimeError, match=said):
        tool.run("http://127.0.0.1:1", "model", [REQUEST, REQUEST])


def _step(share: float, **changed: float) -> dict[str, Any]:
    told = {"num_failed": 0, "num_rejected": 0, "goodput_share": 1.0} | changed
    return {"share": share, "report": {"surfaces": {"http": told}}}


def _check(off: float) -> dict[str, dict[str, float]]:
    return {
        "paceline": {"requests per second": 2 * (1 + off)},
        "wire of paceline": {},
        "aiperf": {"requests per second": 2},
        "wire of aiperf": {},
    }


def _failing(*steps: dict[str, Any], offs: tuple[float, ...] = (0.0,)) -> list[str]:
    bars = hold_bars(steps, [_check(off) for off in offs], "")
    return [name for name, bar in bars.items() if bar["holds"] is False]


def test_refusals_are_for_overload_only():
    assert not _failing(_step(1.3, num_failed=3, num_rejected=3, goodput_share=0.4))
    assert _failing(_step(1.0, num_failed=3, num_rejected=3)) == [
        "http at 1 of the capacity: requests refused"
    ]
    assert _failing(_step(1.3, num_failed=3, num_rejected=2)) == [
        "http at 1.3 of the capacity: requests that broke"
    ]


def test_requests_must_be_good_where_there_is_room():
    assert not _failing(_step(1.0, goodput_share=0.1))
    assert _failing(_step(0.8, goodput_share=0.89))


def test_tools_agree_by_the_median_of_their_ratios():
    assert not _failing(offs=(0.04, -0.2, 0.04))
    assert _failing(offs=(0.06, -0.2, 0.07))
    assert _failing(offs=(-0.06,))


@pytest.mark.parametrize(("seen_ms", "holds"), [(110.0, True), (116.0, False)])
def test_a_tool_that_slows_the_server_is_not_blamed_for_it(seen_ms: float, *, holds: bool):
    name = "mean ms to the first text"
    check = {
        "paceline": {name: seen_ms},
        "wire of paceline": {name: 100.0},
        "aiperf": {name: 220.0},
        "wire of aiperf": {name: 200.0},
    }
    [bar] = hold_bars([], [check], "").values()
    assert bar["holds"] is holds


def _event(content: str) -> bytes:
    return b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % content.encode()


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.mark.parametrize("num_bytes", [1, 7, 10_000])
def test_answers_are_timed_however_their_bytes_are_cut(num_bytes: int):
    found: list[Timed] = []
    now = 0.0
    clock = AnswerClock(found.append, lambda: now)
    parts = [(1.0, _event("")), (2.0, _event("a")), (4.0, _event("b")), (5.0, USAGE + DONE)]
    for began in (0.0, 100.0):
        now = began
        clock.asked()
        now += 0.5
        clock.asked()  # a body behind its head
        for at, data in parts:
            now = began + at
            for start in range(0, len(data), num_bytes):
                clock.answered(data[start : start + num_bytes])
    assert found == [Timed(2.0, 4.0, 5)] * 2


async def _serve_answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.readline():
        for data in (_event("a"), _event("b"), USAGE, DONE):
            writer.write(data)
            await writer.drain()
    writer.close()


async def test_a_relay_counts_the_answers_that_pass():
    server = await asyncio.start_server(_serve_answers, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()

    async def ask(url: str, times: int) -> dict[str, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        for _ in range(times):
            writer.write(b"a request\n")
            await reader.readuntil(DONE)
        writer.close()
        return {"requests per second": float(times)}

    loop = asyncio.get_running_loop()

    def run(times: int) -> dict[str, float]:
        return asyncio.run_coroutine_threadsafe(ask(between.url, times), loop).result(60)

    with wire(f"http://{host}:{port}") as between:
        seen, passed = await asyncio.to_thread(between.timed, 3, lambda: run(3))
        assert seen == {"requests per second": 3.0}
        assert set(passed) < set(aiperf.MEASURES)
        assert 0 < passed["mean ms to the first text"] <= passed["mean ms to the last text"]
        with pytest.raises(RuntimeError, match="1 of 2 answers"):
            await asyncio.to_thread(between.timed, 2, lambda: run(1))
    server.close()


def test_without_aiperf_agreement_neither_holds_nor_fails():
    [bar] = hold_bars([], [], "pip ended with 1").values()
    assert (bar["holds"], bar["why"]) == (None, "pip ended with 1")
