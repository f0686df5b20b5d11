"""Asks all contestants the same questions in alternation and keeps each one's best answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from tests.bench.engine.protocol import prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.engine.environments import Entry

WIDTHS = (1, 2, 4, 8, 16, 32)
_WIDTH_CONTEXT = 512


class Load(NamedTuple):
    """One thing to measure by answering prompts."""

    name: str
    context: int
    batch: int
    num_new_tokens: int


LOADS = (
    Load("decode, context 128", 128, 1, 33),
    Load("decode, context 1024", 1024, 1, 33),
    Load("decode, batch 8", 128, 8, 17),
    Load("decode, batch 32", 128, 32, 9),
    Load("prefill 4096", 4096, 1, 2),
)


class Runner:
    """A contestant's process."""

    def __init__(self, entry: Entry, log: IO[str]) -> None:
        self.name, self.is_ours = entry.name, entry.is_ours
        self._process = subprocess.Popen(
            entry.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
        self.facts: dict[str, Any] = self._read()

    def ask(self, **question: Any) -> Any:
        """The contestant's answer; None if it cannot do this."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        reply = self._read()
        self.facts["peak_mb"] = reply["peak_mb"]
        return reply["answer"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has died with status {self._process.wait()}")
        return json.loads(line)


def race(entries: Sequence[Entry], rounds: int, log: IO[str]) -> list[dict[str, Any]]:
    """One row per contestant: facts, tokens per second of each load, ms of each forward width."""
    runners = [Runner(entry, log) for entry in entries]
    rows: list[dict[str, Any]] = [
        {"name": runner.name, "is_ours": runner.is_ours, "tok_per_s": {}, "forward_ms": {}}
        for runner in runners
    ]
    try:
        for turn in range(rounds + 1):  # the first one warms up
            for number, load in enumerate(LOADS):
                seeds = range(1000 * turn + 100 * number, 1000 * turn + 100 * number + load.batch)
                prompts = [prompt(load.context, seed + 1) for seed in seeds]
                for runner, row in zip(runners, rows, strict=True):
                    answer = runner.ask(
                        do="generate", prompts=prompts, num_new_tokens=load.num_new_tokens
                    )
                    if turn and answer is not None:
                        _keep(row["tok_per_s"], load, *answer)
            for width in WIDTHS:
                for runner, row in zip(runners, rows, strict=True):
                    answer = runner.ask(do="forward", context=_WIDTH_CONTEXT, num_tokens=width)
                    if turn and answer is not None:
                        best = row["forward_ms"].get(str(width), float("inf"))
                        row["forward_ms"][str(width)] = min(best, answer * 1e3)
            sys.stderr.write(f"round {turn} of {rounds}\n")
        for runner, row in zip(runners, rows, strict=True):
            row |= runner.facts
    finally:
        for runner in runners:
            runner.close()
    return rows


def _keep(best: dict[str, float], load: Load, ttft_s: float, step_s: float) -> None:
    found = {}
    if load.name.startswith("decode"):
        found[load.name] = load.batch / step_s
    if load.batch == 1 and load.context >= 1024:
        found[f"prefill {load.context}"] = load.context / ttft_s
    for name, speed in found.items():
        best[name] = max(best.get(name, 0.0), speed)
