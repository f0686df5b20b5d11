"""``make bench-gpu``: the real SGLang on one GPU: plain, with its own drafts, ours, and a tier.

One contestant after the other on the same device, each asked the same questions. Prints tables,
writes ``build/reports/gpu.json`` and ``gpu.png``. Needs no network: the default model comes with
the installed packages, and ``--shape`` has SGLang draw the weights of a larger one.

Ends with 0 when all contestants ran, 1 when one did not, 2 when there is no SGLang, and 3 when
there is no CUDA device. ``--device cpu`` goes the same way on a CPU, for the way's sake.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from deployments.engine.config import TorchEngineConfig
from deployments.tokenizer import ChatTurn, Tokenizer
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from tests.bench.gpu.field import (
    PLAIN,
    Machine,
    NotRunningError,
    all_entries,
    engine_settings,
    running,
)
from tests.bench.gpu.model import SHAPES, Target, default_target, random_target
from tests.bench.gpu.pool import pool, target_identity
from tests.bench.gpu.report import add_speed_ups, draw, show
from tests.bench.gpu.stages import Plan, measure

NO_SGLANG, NO_DEVICE = 2, 3
_FOLDER = Path("build/reports")
_VALKEY_BYTES = 8 << 30
_QUICK_VALKEY_BYTES = 512 << 20
_PROBE = """
import json, sglang, torch
found = torch.cuda.is_available()
print(json.dumps({
    "sglang": sglang.__version__, "torch": torch.__version__, "cuda": torch.version.cuda,
    "device": torch.cuda.get_device_name() if found else None}))
"""


def main() -> int:
    """Measure, report."""
    told = _arguments()
    probed = _probe(told.python)
    if probed is None:
        say(f"no SGLang: {told.python or 'no Python is named'}; set SGLANG_PYTHON or --python")
        return NO_SGLANG
    if told.device == "cuda" and probed["device"] is None:
        say(f"no CUDA device: torch {probed['torch']} of {told.python} finds none")
        return NO_DEVICE
    machine = Machine(told.python, told.device, told.memory_fraction)
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="paceline-gpu-") as scratch:
        target = _target(told, Path(scratch))
        rows, absent = _run(told, machine, target, Path(scratch))
    add_speed_ups(rows)
    report = {
        "command": " ".join(["python -m tests.bench.gpu", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": platform.platform(),
        "load_average": os.getloadavg()[0],
        "device": probed["device"] if told.device == "cuda" else "cpu",
        "versions": probed,
        "target": target.name,
        "draft": _draft(told, target),
        "draft_tokens": told.draft_tokens,
        "acceptance_counts": not target.is_random,
        "rows": rows,
        "absent": absent,
        "bars": {
            "contestants_that_ran": {
                "value": len({row["contestant"] for row in rows}),
                "bar": len({row["contestant"] for row in rows} | absent.keys()),
                "holds": not absent,
            }
        },
    }
    path = _FOLDER / "gpu.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)
    if rows:
        draw(report, path.with_suffix(".png"))
    say(f"written: {path} and {path.with_suffix('.png')}")
    return 1 if absent else 0


def _run(
    told: argparse.Namespace, machine: Machine, target: Target, scratch: Path
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    entries = all_entries(told.head, told.draft_model, told.draft_tokens)
    plan = Plan.quick() if told.quick else Plan.whole()
    # The shipped drafts name the default model as a cluster does that serves it.
    model = "" if target.is_default else str(target.folder)
    name = model or TorchEngineConfig().model
    identity = target_identity(name)
    tokenizer = Tokenizer.load(target.folder)

    def chat(text: str) -> list[int]:
        return tokenizer.encode_chat([ChatTurn(role="user", content=text)])

    draft = _draft(told, target)
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        endpoint = None
        try:
            endpoint = stack.enter_context(pool(name, draft))
        except RuntimeError as error:
            absent = {entry.name: str(error) for entry in entries if entry.is_drafted}
            entries = [entry for entry in entries if not entry.is_drafted]
        valkey = EmbeddedValkey(_QUICK_VALKEY_BYTES if told.quick else _VALKEY_BYTES)
        valkey.start()
        stack.callback(valkey.stop)
        for number, entry in enumerate(entries):
            place = scratch / str(number)
            place.mkdir()
            settings = engine_settings(entry, target, machine, told.draft_tokens)
            say(f"{entry.name}: starting")
            try:
                with running(
                    entry,
                    settings,
                    machine,
                    identity=identity,
                    endpoint=endpoint,
                    tier_url=valkey.url,
                    place=place,
                    log=_FOLDER / f"gpu-{number}.log",
                ) as contestant:
                    found = measure(contestant, entry, plan, chat, say)
            except NotRunningError as error:
                absent[entry.name] = str(error)
                say(f"{entry.name}: {error}")
                if entry.name == PLAIN:
                    break
                continue
            rows += [{"contestant": entry.name} | row for row in found]
    return rows, absent


def _draft(told: argparse.Namespace, target: Target) -> dict[str, Any]:
    """Settings of the draft replica, which runs in our own environment."""
    drafter = told.drafter or ("student" if target.is_default else "suffix")
    draft: dict[str, Any] = {"drafter": drafter, "num_threads": 1}
    if told.device == "cuda" and drafter != "suffix" and torch.cuda.is_available():
        draft["device"] = "cuda"
    return draft


def _target(told: argparse.Namespace, scratch: Path) -> Target:
    if told.model is not None:
        return Target(told.model.name, told.model, is_random=False, is_default=False)
    if told.shape is not None:
        return random_target(told.shape, scratch)
    return default_target(scratch)


def _probe(python: Path | None) -> dict[str, Any] | None:
    """What SGLang's environment holds, or None where it holds no SGLang."""
    if python is None:
        return None
    variables = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            [str(python), "-c", _PROBE], env=variables, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    if run.returncode:
        return None
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def _arguments() -> argparse.Namespace:
    own = os.environ.get("SGLANG_PYTHON")
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", type=Path, default=Path(own) if own else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few questions, short answers")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, help="folder of another model, with *.safetensors")
    what.add_argument("--shape", choices=tuple(SHAPES), help="random weights of this shape")
    parser.add_argument("--head", type=Path, help="folder of an EAGLE-3 head for the model")
    parser.add_argument("--draft-model", type=Path, help="folder of a draft model for SGLang's own")
    parser.add_argument("--drafter", help="of the draft replica, as draft.drafter")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--memory-fraction", type=float, default=0.7)
    return parser.parse_args()


def say(line: str) -> None:
    """To the terminal, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
