"""``make bench-kv``: codecs, hot tier and SSD tier beside their peers and limits, in one run.

Prints tables, writes ``build/reports/kv.json`` and ``build/reports/kv.png``. ``--quick`` leaves out
the model, so ratio and loss on real keys and values.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from tests.bench.kv.bars import hold_bars
from tests.bench.kv.codec_speed import measure_codecs
from tests.bench.kv.hot_tier import measure_hot_tier
from tests.bench.kv.plot import draw
from tests.bench.kv.ssd_tier import measure_ssd_tier
from tests.bench.kv.table import print_table

REPORT = Path("build/reports/kv.json")


def main() -> int:
    """Measure, report; 1 if a bar does not hold."""
    report: dict[str, Any] = {
        "machine": {
            "cpu_count": os.cpu_count(),
            "platform": platform.platform(),
            "load_average_at_start": os.getloadavg()[0],
        },
        "codecs": measure_codecs(),
    }
    print_table("Codecs (raw GB per CPU second)", report["codecs"])
    report["hot"], report["exists_per_s"] = measure_hot_tier()
    print_table("GET over loopback, from one Valkey (Mooncake: from its own node)", report["hot"])
    print_table(
        "EXISTS", [{"client": k, "keys_per_s": v} for k, v in report["exists_per_s"].items()]
    )
    report["ssd"] = measure_ssd_tier()
    print_table("SSD reads", report["ssd"])
    report["quality"] = []
    if "--quick" not in sys.argv:
        from tests.bench.kv.quality import measure_quality

        report["quality"] = measure_quality()
        print_table("Loss on SmolLM2-135M-Instruct", report["quality"])
    report["bars"] = hold_bars(report)
    print_table("Bars", [{"name": name} | bar for name, bar in report["bars"].items()])
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, REPORT.with_suffix(".png"))
    sys.stdout.write(f"written: {REPORT} and {REPORT.with_suffix('.png')}\n")
    return 0 if all(bar["holds"] for bar in report["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
