"""``make chaos-kv``: whatever a tier does, no wrong page is served and nothing is raised.

Prints tables and writes ``build/reports/chaos_kv.json``; 1 if a bar does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.bench.kv.table import print_table
from tests.chaos.kv.other_nodes import break_other_nodes
from tests.chaos.kv.pages import be_quiet
from tests.chaos.kv.processes import freeze_valkey, kill_valkey, kill_writers
from tests.chaos.kv.tier_faults import DISKS, PLANS, run_fault

REPORT = Path("build/reports/chaos_kv.json")
MIN_OPERATIONS = 100_000
MAX_SECONDS = 300.0
_NUM_PROCESSES = 2


def main() -> int:
    """Break things, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=MIN_OPERATIONS, help="under every fault")
    num_operations = parser.parse_args().operations
    be_quiet()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="paceline-chaos-") as folder:
        root = Path(folder)
        names = (*PLANS, *DISKS)
        with ProcessPoolExecutor(_NUM_PROCESSES, get_context("spawn"), be_quiet) as processes:
            rows = [
                processes.submit(run_fault, name, num_operations, root / name) for name in names
            ]
            faults = [row.result() for row in rows]
        print_table("Faults of tiers and disks", _without_errors(faults))
        events = [
            drill(root / drill.__name__)
            for drill in (kill_valkey, freeze_valkey, kill_writers, break_other_nodes)
        ]
        print_table("Processes that die or stop", _without_errors(events))
    seconds = time.monotonic() - started
    report = {
        "faults": faults,
        "events": events,
        "bars": _bars(faults, events, seconds),
    }
    print_table("Bars", [{"name": name} | bar for name, bar in report["bars"].items()])
    for row in (*faults, *events):
        for error in row["errors"]:
            sys.stdout.write(f"{row.get('fault') or row.get('event')}: {error}\n")
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"written: {REPORT}\n")
    return 0 if all(bar["holds"] for bar in report["bars"].values()) else 1


def _bars(
    faults: list[dict[str, Any]], events: list[dict[str, Any]], seconds: float
) -> dict[str, dict[str, Any]]:
    rows = [*faults, *events]
    values = {
        "wrong pages": (sum(row["wrong_pages"] for row in rows), 0, "at most"),
        "operations raised": (sum(row["raised"] for row in rows), 0, "at most"),
        "page operations under each fault": (
            min(row["page_operations"] for row in faults),
            MIN_OPERATIONS,
            "at least",
        ),
        "faults that happened, of each kind": (min(row["faults"] for row in faults), 1, "at least"),
        "pages served under each fault": (
            min(row["pages_served"] for row in rows),
            1,
            "at least",
        ),
        "recoveries without a restart": (
            sum(row["recovered"] for row in rows),
            len(rows),
            "at least",
        ),
        "seconds": (round(seconds, 1), MAX_SECONDS, "at most"),
    }
    return {
        name: {
            "value": value,
            "bar": f"{sense} {bar}",
            "holds": value <= bar if sense == "at most" else value >= bar,
        }
        for name, (value, bar, sense) in values.items()
    }


def _without_errors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    hidden = ("errors", "pages_found_after_each")
    return [{name: row[name] for name in row if name not in hidden} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
