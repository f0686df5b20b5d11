"""``python -m tests.bench.engine``: the embedded engine beside its peers on this machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from tests.bench.engine.environments import entries
from tests.bench.engine.race import race
from tests.bench.engine.report import draw, hold_bars, show

_FOLDER = Path("build/reports")


def main() -> None:
    """Measure, print, write ``build/reports/engine.json`` and ``engine.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of contestants' names")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    chosen = [
        entry
        for entry in entries(options.threads)
        if any(part in entry.name for part in options.only)
    ]
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with (_FOLDER / "engine.log").open("w", encoding="utf-8") as log:
        rows = race(chosen, options.rounds, log)
    bars = hold_bars(rows)
    report = {
        "bars": bars,
        "threads": options.threads,
        "rounds": options.rounds,
        "machine": platform.platform(),
        "contestants": rows,
    }
    (_FOLDER / "engine.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(rows, _FOLDER / "engine.png")
    show(rows, bars)


if __name__ == "__main__":
    main()
