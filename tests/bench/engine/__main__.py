"""``python -m tests.bench.engine``: the embedded engine beside its peers on this machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from pathlib import Path

from tests.bench.engine.bars import hold_bars
from tests.bench.engine.environments import find_field
from tests.bench.engine.plot import draw
from tests.bench.engine.race import race
from tests.bench.engine.report import show, summary

_FOLDER = Path("build/reports")


def main() -> int:
    """Measure, print, write ``build/reports/engine.json`` and ``engine.png``.

    Returns:
        1 if a bar that was measured does not hold.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=25, help="no question after this time")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of contestants' names")
    parser.add_argument("--loads", nargs="*", default=[""], help="parts of what is asked")
    parser.add_argument(
        "--quick", action="store_true", help="one round, of whom the bars are about"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    field = find_field(options.threads)
    chosen = [
        entry
        for entry in field.entries
        if any(part in entry.name for part in options.only)
        and (entry.is_essential or not options.quick)
    ]
    rounds = 1 if options.quick else options.rounds
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with (_FOLDER / "engine.log").open("w", encoding="utf-8") as log:
        rows, dead = race(chosen, options.loads, rounds, options.minutes * 60, log)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cost the report
    absent = field.absent | dead
    bars = hold_bars(rows, absent)
    report = {
        "bars": bars,
        "threads": options.threads,
        "rounds": rounds,
        "machine": platform.platform(),
        "load_average": os.getloadavg()[0],
        "absent": absent,
        "contestants": [row | {"summary": summary(row["samples"])} for row in rows],
    }
    (_FOLDER / "engine.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(rows, _FOLDER / "engine.png")
    show(rows, bars, absent)
    return 1 if any(bar["holds"] is False for bar in bars.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
