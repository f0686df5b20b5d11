"""Asks all contestants the same questions in alternation and keeps every answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from statistics import median
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from tests.bench.engine.protocol import prompt

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.bench.engine.environments import Entry

WIDTHS = (1, 2, 4, 8, 16, 32)
_WIDTH_CONTEXT = 512
_LONG_TURN_S = 6.0
"""What takes longer than this is not asked again."""
_TOO_LONG_S = 30.0
"""What would take this long by the contestant's own speed at shorter prompts is not asked."""
_CALM_S = 0.05
"""Between two contestants, so that threads of the one that has answered have gone to sleep."""


class Load(NamedTuple):
    """Prompts that come together.

    Attributes:
        num_asked: in a round; speed swings by a quarter on a shared machine, so what is judged is
            asked often.
    """

    name: str
    context: int
    batch: int
    num_new_tokens: int
    num_asked: int = 1


class Arrivals(NamedTuple):
    """Prompts that come one after the other."""

    name: str
    context: int
    count: int
    interval_s: float
    num_new_tokens: int


LOADS = (
    Load("decode, context 128", 128, 1, 33, 5),
    Load("decode, context 1024", 1024, 1, 33, 5),
    Load("decode, batch 8", 128, 8, 17, 5),
    Load("decode, batch 32", 128, 32, 9),
    Load("prefill 4096", 4096, 1, 2),
)
ARRIVALS = Arrivals("TTFT under load", 256, 8, 0.5, 24)


class DiedError(Exception):
    """A contestant's process has ended."""


class Runner:
    """A contestant's process, and what is known of it."""

    def __init__(self, entry: Entry, log: IO[str]) -> None:
        """Start it and wait until it is ready.

        Raises:
            DiedError: it did not become ready.
        """
        started = time.perf_counter()
        self._process = subprocess.Popen(
            entry.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | entry.variables,
        )
        self.row: dict[str, Any] = {
            "name": entry.name,
            "is_ours": entry.is_ours,
            **self._read(),
            "startup_s": time.perf_counter() - started,
            "samples": {},
        }
        self.finished: set[str] = set()  # questions that need not be asked again

    def ask(self, **question: Any) -> Any:
        """The contestant's answer; None if it cannot do this.

        Raises:
            DiedError: it died of it, now or earlier.
        """
        time.sleep(_CALM_S)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise DiedError(f"status {self._process.wait()}") from error
        reply = self._read()
        self.row |= {fact: reply[fact] for fact in ("peak_mb", "resident_mb")}
        return reply["answer"]

    def keep(self, found: dict[str, list[float]]) -> None:
        """Add samples to measures."""
        for name, values in found.items():
            self.row["samples"].setdefault(name, []).extend(values)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise DiedError(f"status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply


class Question(NamedTuple):
    """One thing to ask.

    Attributes:
        key: of the question, however often it is asked.
        load: what it measures; None for a forward.
    """

    key: str
    load: Load | Arrivals | None
    told: dict[str, Any]


def race(
    entries: Sequence[Entry], loads: Sequence[str], rounds: int, limit_s: float, log: IO[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Ask everybody everything ``rounds`` times.

    A short question warms everybody up first; what is slow only the first time at some shape is
    left to the median.

    Args:
        entries: who takes part; all are started before the first question.
        loads: parts of the names of the questions to ask.
        rounds: at least 1, of which later ones are left out if they would not end in time.
        limit_s: when no question is asked any more, and no round is begun that would end later.
        log: what the contestants write.

    Returns:
        One row per contestant: facts, and samples by measure (tokens per second, seconds, or
        milliseconds of a forward); and the contestants that died, with the reason.
    """
    runners: list[Runner] = []
    dead: dict[str, str] = {}
    started = time.perf_counter()
    try:
        for entry in entries:
            try:
                runner = Runner(entry, log)
                runners.append(runner)
                runner.ask(do="generate", prompts=[prompt(64, 1)], num_new_tokens=3)
            except DiedError as error:
                dead[entry.name] = f"it ended with {error}; see {log.name}"
            _say(f"started {entry.name}")
        for turn in range(rounds):
            turn_began = time.perf_counter()
            for question in _questions(turn):
                if not any(part in question.key for part in loads):
                    continue
                if time.perf_counter() - started > limit_s:
                    _say(f"out of time before {question.key}")
                    break
                for runner in [each for each in runners if each.row["name"] not in dead]:
                    try:
                        _ask(runner, question)
                    except DiedError as error:
                        dead[runner.row["name"]] = f"{question.key} ended with {error}"
            now = time.perf_counter()
            _say(f"round {turn + 1} of {rounds}: {now - turn_began:.0f} s")
            if now + (now - turn_began) / 2 - started > limit_s:  # later rounds are shorter
                break
    except KeyboardInterrupt:
        _say("ended early; what was measured is reported")
    finally:
        for runner in runners:
            runner.close()
    return [runner.row for runner in runners], dead


def _ask(runner: Runner, question: Question) -> None:
    if question.key in runner.finished or _expected_s(runner, question) > _TOO_LONG_S:
        return
    began = time.perf_counter()
    answer = runner.ask(**question.told)
    if answer is None or time.perf_counter() - began > _LONG_TURN_S:
        runner.finished.add(question.key)
    if answer is not None:
        runner.keep(_samples(question, answer))


def _expected_s(runner: Runner, question: Question) -> float:
    """Until the first tokens of a load, if long prompts are computed as fast as one was already."""
    speeds = runner.row["samples"].get("prefill 1024")
    if speeds is None or not isinstance(question.load, Load):
        return 0.0
    return question.load.context * question.load.batch / median(speeds)


def _questions(turn: int) -> Iterator[Question]:
    for number, load in enumerate(LOADS):
        for again in range(load.num_asked):
            first = 10_000 * turn + 1000 * number + 100 * again + 2
            prompts = [prompt(load.context, first + place) for place in range(load.batch)]
            told = {"do": "generate", "prompts": prompts, "num_new_tokens": load.num_new_tokens}
            yield Question(load.name, load, told)
    for width in WIDTHS:
        told = {"do": "forward", "context": _WIDTH_CONTEXT, "num_tokens": width}
        yield Question(f"forward {width}", None, told)
    if turn == 0:
        prompts = [
            prompt(ARRIVALS.context, 10_000 * turn + 9000 + n) for n in range(ARRIVALS.count)
        ]
        told = {
            "do": "arrivals",
            "prompts": prompts,
            "interval_s": ARRIVALS.interval_s,
            "num_new_tokens": ARRIVALS.num_new_tokens,
        }
        yield Question(ARRIVALS.name, ARRIVALS, told)


def _samples(question: Question, answer: Any) -> dict[str, list[float]]:
    load = question.load
    if load is None:
        return {question.key: [answer * 1e3]}
    if isinstance(load, Arrivals):
        return {load.name: [ttft * 1e3 for ttft in answer]}
    ttft_s, step_s = answer
    found = {}
    if load.name.startswith("decode"):
        found[load.name] = [load.batch / step_s]
    if load.batch == 1 and load.context >= 1024:
        found[f"prefill {load.context}"] = [load.context / ttft_s]
    return found


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
