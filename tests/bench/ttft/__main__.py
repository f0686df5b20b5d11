"""``make bench-ttft``: what pages of another replica save of the time to the first token.

Two processes are two nodes: one computes prompts, the other answers them from Valkey, from its own
folder, or from the first one's page server. Prints tables, writes ``build/reports/ttft.json`` and
``ttft.png``; 1 if a bar does not hold. ``--quick`` takes short prompts and one round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from tests.bench.kv.table import print_table
from tests.bench.ttft.bars import hold_bars
from tests.bench.ttft.measure import Stage, TtftRuns
from tests.bench.ttft.neighbours import measure_neighbours
from tests.bench.ttft.plot import draw
from tests.bench.ttft.replica import load_weights, make_prompt

REPORT = Path("build/reports/ttft.json")
_LENGTHS = (1024, 4096, 7168)
_QUICK_LENGTHS = (256, 1024)
_NUM_NEIGHBOUR_PROMPTS = 5
_HIDDEN = ("samples_s", "cold_samples_s")


def main() -> int:
    """Measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of loads beside decoding")
    parser.add_argument("--quick", action="store_true", help="short prompts, one round")
    options = parser.parse_args()
    lengths = _QUICK_LENGTHS if options.quick else _LENGTHS
    rounds = 1 if options.quick else options.rounds
    seconds = min(options.seconds, 8.0) if options.quick else options.seconds
    prepare_builtin(default_cache_dir(), print)
    loaded = load_weights()
    prompts = {length: make_prompt(length, number) for number, length in enumerate(lengths)}
    beside = [make_prompt(lengths[1], 10 + number) for number in range(_NUM_NEIGHBOUR_PROMPTS)]
    report: dict[str, Any] = {
        "threads": options.threads,
        "rounds": rounds,
        "machine": platform.platform(),
        "load_average_at_start": os.getloadavg()[0],
    }

    def act(stage: Stage) -> None:
        report["neighbours"] = measure_neighbours(
            loaded, stage.tiers["valkey"], beside, seconds=seconds, num_threads=options.threads
        )
        stage.forget_later_pages()
        report["ttft"] = TtftRuns(stage, loaded, options.threads).measure(prompts, rounds)

    with tempfile.TemporaryDirectory(prefix="paceline-ttft-") as folder:
        Stage(Path(folder), [*prompts.values(), *beside], options.threads).run(act)
    shown = [{k: v for k, v in row.items() if k not in _HIDDEN} for row in report["ttft"]]
    print_table("Time to first token", shown)
    print_table("Decoding beside loads", [report["neighbours"]])
    report["bars"] = hold_bars(report)
    print_table("Bars", [{"name": name} | bar for name, bar in report["bars"].items()])
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, REPORT.with_suffix(".png"))
    sys.stdout.write(f"written: {REPORT} and {REPORT.with_suffix('.png')}\n")
    return 0 if all(bar["holds"] for bar in report["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
