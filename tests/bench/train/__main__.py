"""``make bench-train``: how fast drafts are trained, against what this machine can do.

The stages of a training (answers, features, optimiser steps) run beside their limits: the floating
point operations of their matrix products at the rate of the largest products this machine
multiplies, plain decoding of a full batch, and the disk. Then a whole training from answers to
weights: offline, with all features on disk, and online, with the target computing beside the
training. Repetitions alternate, medians count. It fails if online and offline differ by a bit, or
more waited in memory than the queue may hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from tests.bench.train.machine import disk_rates, matmul_flops
from tests.bench.train.report import bars_of, draw, mode_rows, show, stage_rows
from tests.bench.train.work import Work

_FOLDER = Path("build/reports")


async def measure(told: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All repetitions: what was measured of limits, stages and modes."""
    cache_dir = default_cache_dir()
    prepare_builtin(cache_dir, _say)
    source = files("deployments.engine.torch_engine") / "data" / "student_prompts.txt"
    work = Work(told, source.read_text(encoding="utf-8").splitlines(), cache_dir, folder)
    dtype = getattr(torch, told.dtype)
    found: dict[str, Any] = {"limits": [], "stages": [], "modes": []}
    engine = work.engine()
    try:
        for repetition in range(told.repetitions):
            flops = matmul_flops(dtype)
            stages = {"answers": await work.regenerate(engine, repetition)}
            plain = await work.decode(engine, repetition)
            disk = disk_rates(folder / "blocks", told.disk_mb << 20)
            alone = {"features": work.capture, "training": work.train}
            for name in alone if repetition % 2 == 0 else reversed(alone):
                stages[name] = alone[name]()
            modes = {"offline": work.offline, "online": work.online}
            trained = {
                name: modes[name]() for name in (modes if repetition % 2 == 0 else reversed(modes))
            }
            found["limits"].append(
                {
                    "matmul_flops": flops,
                    "plain_decode_rate": plain.rate,
                    "disk_write_rate": disk.write / work.bytes_per_token,
                    "disk_read_rate": disk.read / work.bytes_per_token,
                }
            )
            found["stages"].append(stages)
            found["modes"].append(trained)
            _say(f"repetition {repetition + 1} of {told.repetitions} is done")
    finally:
        await engine.close()
    return found


def main() -> int:
    """Measure, print, write ``build/reports/train.json`` and ``train.png``; 2 if a bar fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=("student", "eagle3"), default="student")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--prompts", type=int, default=40, help="of a repetition")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--queue-mb", type=int, default=4, help="of features that may wait")
    parser.add_argument("--disk-mb", type=int, default=256, help="written to measure the disk")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    told = parser.parse_args()
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_FOLDER) as folder:
        found = asyncio.run(measure(told, Path(folder)))
    stages, modes = stage_rows(found), mode_rows(found)
    bars = bars_of(found)
    report = {
        "machine": platform.platform(),
        "options": vars(told),
        "limits": found["limits"],
        "stages": stages,
        "modes": modes,
        "bars": [bar._asdict() | {"holds": bar.holds} for bar in bars],
    }
    (_FOLDER / "train.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(stages, modes, bars)
    draw(stages, modes, _FOLDER / "train.png")
    return 0 if all(bar.holds for bar in bars) else 2


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
