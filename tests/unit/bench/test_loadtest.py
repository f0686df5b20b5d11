"""The load test's own logic: a closed loop, what aiperf is asked and tells, and the bars."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from cluster.load.outcome import Outcome
from cluster.load.surfaces import Counts, Piece
from cluster.load.workload import LoadRequest
from tests.bench.loadtest import aiperf, server_view
from tests.bench.loadtest.bars import hold_bars
from tests.bench.loadtest.capacity import find_capacity

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
        "server of paceline": {},
        "aiperf": {"requests per second": 2},
        "server of aiperf": {},
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
        "server of paceline": {name: 100.0},
        "aiperf": {name: 220.0},
        "server of aiperf": {name: 200.0},
    }
    [bar] = hold_bars([], [check], "").values()
    assert bar["holds"] is holds


def test_the_server_s_figures_are_those_of_one_run(monkeypatch: pytest.MonkeyPatch):
    totals = [(4, 1.0), (4, 1.0), (5, 1.5), (6, 2.0)]
    scrapes = iter(totals)

    class Snapshot:
        def __init__(self) -> None:
            self.count, self.sum = next(scrapes)

        def total(self, name: str, **labels: str) -> float:
            assert labels == {"surface": "http"}
            return self.count if name.endswith("_count") else self.sum

    monkeypatch.setattr(server_view.MetricsSnapshot, "read", lambda _: Snapshot())
    monkeypatch.setattr(server_view, "_PAUSE_S", 0.0)
    seen, served = server_view.with_server_view("url", 2, lambda: {"requests per second": 2.0})
    assert seen == {"requests per second": 2.0}
    assert served == dict.fromkeys(server_view.MEASURES, 500.0)
    assert set(served) < set(aiperf.MEASURES)

    monkeypatch.setattr(server_view, "_PATIENCE_S", -1.0)
    scrapes = iter(totals)
    with pytest.raises(RuntimeError, match="of 2 requests"):
        server_view.with_server_view("url", 2, dict)


def test_without_aiperf_agreement_neither_holds_nor_fails():
    [bar] = hold_bars([], [], "pip ended with 1").values()
    assert (bar["holds"], bar["why"]) == (None, "pip ended with 1")
