"""``make bench-sglang``: what drafts are worth inside the real SGLang on this machine's CPU.

One SGLang per contestant, all in float32, asked the same questions in alternation: without drafts,
with those of a draft replica, with those and local copies, with drafts that are always wrong, and
with SGLang's own NGRAM. The draft replicas are processes of their own behind gRPC. Prints a table,
writes ``build/reports/sglang.json`` and ``sglang.png``; 1 if a bar does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.engine.config import TorchEngineConfig
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.tokenizer import ChatTurn, Tokenizer
from tests.bench.sglang.bars import hold_bars
from tests.bench.sglang.field import NONE, Contestant, Entry, NotRunningError, all_entries
from tests.bench.sglang.race import Answers, Question, questions, race, rows_of
from tests.bench.sglang.report import draw, show
from tests.bench.sglang.texts import differences, float64_gap
from tests.bench.split.pool import SECRET, draft_pool, identity
from tests.bench.split.prompts import mt_bench, prompts
from tests.exactness import Reference
from tests.sglang.dense_model import write_dense_model

if TYPE_CHECKING:
    from collections.abc import Sequence

_FOLDER = Path("build/reports")
_MT_BENCH, _REPEATING = "MT-bench", "repeating"
_MORE_REPEATING = (
    "Write the word lemon thirty times, with a comma behind each.",
    "Repeat this line eight times: the train leaves at nine and comes back at ten.",
    "List the days of the week, four times over, one per line.",
    "Say ten times, one per line: north, east, south, west.",
)
_PLAN = ((_MT_BENCH, 1, 6), (_REPEATING, 1, 4), (_MT_BENCH, 4, 4), (_REPEATING, 4, 1))
_QUICK_PLAN = ((_MT_BENCH, 1, 1), (_REPEATING, 1, 1), (_MT_BENCH, 4, 1))


class Bench:
    """One run.

    Args:
        told: the command line.
        model: folder.

    Attributes:
        names: of all contestants that were to take part.
        absent: who did not run, with the reason.
        counters: of the draft streams, by contestant with our algorithm.
        version: of SGLang.
    """

    def __init__(self, told: argparse.Namespace, model: Path) -> None:
        self._told = told
        self._model = model
        self._tokenizer = Tokenizer.load(model)
        self._identity = identity(TorchEngineConfig(), self._tokenizer)
        self._entries = [
            entry
            for entry in all_entries(told.draft_tokens, told.fanout)
            if entry.name == NONE
            or (
                any(part in entry.name for part in told.only)
                and (entry.is_essential or not told.quick)
            )
        ]
        self.names = [entry.name for entry in self._entries]
        self.absent: dict[str, str] = {}
        self.counters: dict[str, dict[str, Any]] = {}
        self.version = ""

    def run(self) -> tuple[list[Question], dict[str, list[Answers]]]:
        """Start everybody, ask, and end everybody.

        Returns:
            The questions, and by contestant its answers to the first of them.
        """
        told = self._told
        own = {
            kind: [self._chat(text) for text in texts]
            for kind, texts in (
                (_MT_BENCH, mt_bench()[4:]),
                (_REPEATING, (*prompts()[_REPEATING], *_MORE_REPEATING)),
            )
        }
        first = [self._chat(text) for text in mt_bench()[:4]]
        asked = questions(own, _QUICK_PLAN if told.quick else _PLAN)
        warm_up = [Question("warm-up", first), Question("warm-up", first[:1])]
        with ExitStack() as stack:
            running = self._started(self._entries, stack)
            if NONE not in {each.entry.name for each in running}:
                raise SystemExit(f"SGLang does not run: {self.absent[NONE]}")
            tokens = told.tokens // 2 if told.quick else told.tokens
            answers, dead = race(running, asked, warm_up, tokens, told.minutes * 60, say)
            self.absent |= dead
            for each in running:
                if each.entry.is_ours and each.entry.name not in dead:
                    self.counters[each.entry.name] = each.ask(do="counters")
        return asked, answers

    def _started(self, entries: Sequence[Entry], stack: ExitStack) -> list[Contestant]:
        began = time.monotonic()
        drafters = dict.fromkeys(entry.drafter for entry in entries if entry.drafter)
        endpoints = {drafter: stack.enter_context(draft_pool(drafter)) for drafter in drafters}
        starting: list[Contestant] = []
        for entry in entries:
            try:
                contestant = Contestant(
                    entry,
                    self._told.python,
                    self._model,
                    self._identity,
                    SECRET.get_secret_value(),
                    endpoints.get(entry.drafter or ""),
                    self._told.threads,
                    _FOLDER / f"sglang-{_file_name(entry.name)}.log",
                )
            except NotRunningError as error:
                self.absent[entry.name] = str(error)
                continue
            stack.callback(contestant.close)
            starting.append(contestant)
        running = []
        for contestant in starting:
            try:
                contestant.wait()
            except NotRunningError as error:
                self.absent[contestant.entry.name] = str(error)
            else:
                running.append(contestant)
                self.version = contestant.version
        say(f"{len(running)} of {len(entries)} contestants run after {_since(began)}")
        return running

    def _chat(self, text: str) -> list[int]:
        return self._tokenizer.encode_chat([ChatTurn(role="user", content=text)])


def main() -> int:
    """Measure, print, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="SGLang's")
    parser.add_argument("--threads", type=int, default=1, help="of each SGLang's arithmetic")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--fanout", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--minutes", type=float, default=6, help="no question after this time")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of contestants' names")
    parser.add_argument("--quick", action="store_true", help="three questions, short answers")
    told = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-sglang-", dir=_FOLDER.parent) as folder:
        bench = Bench(told, write_dense_model(Path(folder)))
        asked, answers = bench.run()
    rows = rows_of(asked, answers)
    differing = differences(asked, answers, float64_gap(Reference(default_cache_dir())))
    unexplained = {
        name: sum(not each["is_rounding"] for each in own) for name, own in differing.items()
    }
    stalls_ms = {name: own["stall_p50_s"] * 1e3 for name, own in bench.counters.items()}
    bars = hold_bars(bench.names, rows, stalls_ms, unexplained)
    report = {
        "bars": bars,
        "machine": platform.platform(),
        "load_average": os.getloadavg()[0],
        "sglang": bench.version,
        "options": {name: str(value) for name, value in vars(told).items()},
        "seconds": time.monotonic() - began,
        "absent": bench.absent,
        "rows": rows,
        "differences": differing,
        "counters": bench.counters,
    }
    (_FOLDER / "sglang.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(rows, _FOLDER / "sglang.png")
    show(rows, stalls_ms, bench.absent, bars)
    return 0 if all(bar["holds"] for bar in bars.values()) else 1


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.0f} s"


def say(text: str) -> None:
    """To whoever waits."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
