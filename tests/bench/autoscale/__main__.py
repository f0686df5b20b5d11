"""``make loadtest-autoscale``: a table, ``build/reports/autoscale.json``, one picture."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.autoscale.plan import TTFT_SLO_S, Plan
from tests.bench.autoscale.plot import draw
from tests.bench.autoscale.report import compare, table
from tests.bench.autoscale.run import run_cluster

if TYPE_CHECKING:
    from collections.abc import Sequence

REPORT = Path("build/reports/autoscale.json")
_RUNS = ("autoscaled", "static")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both clusters one after the other; 1 if a bar of a whole run is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second at 1x")
    parser.add_argument(
        "--time-scale", type=float, default=1.0, help="of all phases; below 1 no bar is claimed"
    )
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--run", choices=_RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    plan = Plan(options.rate, options.time_scale)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.run:
        report = run_cluster(plan, is_static=options.run == "static", say=_say)
        options.out.write_text(json.dumps(report), encoding="utf-8")
        return 0
    autoscaled, static = (_in_process(plan, name, options.out) for name in _RUNS)
    report = compare(autoscaled, static, plan.seconds)
    report["plan"] = {
        "profile": plan.profile,
        "rate": plan.rate,
        "ttft_slo_s": TTFT_SLO_S,
        "time_scale": plan.time_scale,
        "rolling_update_at_s": plan.update_at_s,
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    picture = options.out.with_suffix(".png")
    _say(table(report))
    _say(f"{options.out} and {picture}" if draw(report, picture) else str(options.out))
    holds = all(bar["holds"] for bar in report["bars"].values())
    return 0 if holds or plan.time_scale < 1 else 1


def _in_process(plan: Plan, name: str, out: Path) -> dict[str, Any]:
    part = out.with_name(f"{out.stem}-{name}.part.json")
    command = [sys.executable, "-m", "tests.bench.autoscale", "--run", name, "--out", str(part)]
    command += ["--rate", str(plan.rate), "--time-scale", str(plan.time_scale)]
    _say(f"{name}: {plan.profile}, {plan.seconds:.0f} s")
    subprocess.run(command, check=True)
    report: dict[str, Any] = json.loads(part.read_text(encoding="utf-8"))
    part.unlink()
    return report


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
