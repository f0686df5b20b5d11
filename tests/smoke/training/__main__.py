"""``make train-smoke``: trains a draft for the default model and checks what its docs claim.

A job on 48 prompts shows that training helps; a smaller one is killed in each of its stages and
must end with the bits of the same job left alone, and so must one that trains while its target
answers. Trained by several processes of a Ray cluster it must end with its weights, also if one of
them is killed. Where ``make test-sglang`` has built its environment, SGLang drafts with the export.
Fails if anything does not hold. Everything lies in ``build/train-smoke``, which is made anew; the
figures are in ``build/reports/train_smoke.json``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from deployments.engine.config import DEFAULT_MODEL
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir, load_model
from deployments.tokenizer import ChatTurn, Tokenizer
from tests.sglang.dense_model import write_dense_model
from tests.sglang.eagle import HeadInSGLang, head_in_sglang
from tests.smoke.training.checks import (
    export_is_exact,
    largest_difference,
    missing_offsets_are_refused,
    same_weights,
    unrolled_difference,
    untrained_quality,
)
from tests.smoke.training.jobs import Command, answered, killed_in_every_stage, processes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_FOLDER = Path("build/train-smoke")
_REPORT = Path("build/reports/train_smoke.json")
_NUM_DRAFT_TOKENS = 3
_MAX_DIFFERENCE = 1e-4
_MAX_WEIGHT_DIFFERENCE = 1e-5
_MAX_SGLANG_DIFFERENCE = 1e-3
"""Of logits up to 30, in float32."""


def settings(max_tokens: int, held_out: int, epochs: int, group_texts: int = 0) -> dict[str, Any]:
    """Of a job small enough for two cores."""
    online = {"mode": "online", "group_texts": group_texts}
    return {
        # Deterministic, so that what is answered again after a kill is answered alike.
        "engine": {"deterministic": True},
        "training": {
            "answers": {"max_tokens": max_tokens, "held_out_prompts": held_out},
            "features": online if group_texts else {},
            "run": {
                "draft_vocab_size": 4096,
                "objective": {"num_unrolls": _NUM_DRAFT_TOKENS},
                "batch_tokens": 512,
                "epochs": epochs,
                "checkpoint_steps": 2,
                "evaluate_steps": 20,
                "num_draft_tokens": _NUM_DRAFT_TOKENS,
            },
        },
    }


def main() -> int:
    """Train, kill, check, report; 1 if a bar does not hold."""
    started = time.monotonic()
    console = Console()
    shutil.rmtree(_FOLDER, ignore_errors=True)
    prepare_builtin(default_cache_dir(), console.print)
    source = files("deployments.engine.torch_engine") / "data" / "student_prompts.txt"
    prompts = source.read_text(encoding="utf-8").splitlines()
    console.rule("a job that trains")
    learned = Command(_FOLDER / "learning", prompts[:48], settings(48, held_out=8, epochs=5))
    out = _FOLDER / "learning" / "out"
    report = learned.run(out)
    console.rule("a smaller job, left alone")
    small = Command(_FOLDER / "small", prompts[48:60], settings(16, held_out=2, epochs=4))
    alone, killed = _FOLDER / "small" / "alone", _FOLDER / "small" / "killed"
    small.run(alone)
    console.rule("the same, killed in each stage")
    killed_in_every_stage(small, killed)
    console.rule("the same online, while the target answers; alone, and killed")
    online = Command(_FOLDER / "online", prompts[48:60], settings(16, 2, 4, group_texts=4))
    beside, cut_off = _FOLDER / "online" / "alone", _FOLDER / "online" / "killed"
    online.run(beside)
    online.kill_when(cut_off, (cut_off / "checkpoint.pt").is_file)
    online.run(cut_off)
    console.rule("the same, trained by two processes, one of which is killed")
    together = answered(alone, _FOLDER / "small" / "together")
    ended = small.run_and_kill_one(together, processes(2))
    console.print(ended.said)
    console.rule("the same, with every matrix cut in three")
    # The default model has nine heads and three key-value heads.
    cut = answered(alone, _FOLDER / "small" / "cut")
    small.run(cut, processes(3, tensor_parallel=3))
    console.rule("the trained head in SGLang")
    served = _in_sglang(console, out, prompts[60:63])
    console.rule("checks")
    loaded = load_model(DEFAULT_MODEL, dtype="float32", cache_dir=default_cache_dir())
    embedding = loaded.model.embed_tokens.weight.detach()
    untrained = untrained_quality(out, embedding, _NUM_DRAFT_TOKENS)
    before, after = (point["quality"] for point in (report["curve"][0], report["best"]))
    lengths = {
        "untrained": untrained.mean_acceptance_length[-1],
        "closed-form start": before["mean_acceptance_length"][-1],
        "trained": after["mean_acceptance_length"][-1],
    }
    bars: dict[str, dict[str, Any]] = {}

    def bar(name: str, value: object, wanted: str, holds: bool) -> None:
        bars[name] = {"value": value, "bar": wanted, "holds": holds}

    trained = lengths["trained"]
    for name in ("untrained", "closed-form start"):
        bar(
            f"tokens a round of 3 commits, held out, over {name}",
            f"{trained:.3f}",
            f"> {lengths[name]:.3f}",
            trained > lengths[name],
        )
    bar("killed in each stage: bits of the weights", *_claim(same_weights(alone, killed)))
    same = same_weights(beside, cut_off)
    bar("killed in a training beside the answers: bits of the weights", *_claim(same))
    bar("killed among two processes: the run", *_claim(_went_on(ended.said), "goes on"))
    bar("processes left behind", str(len(ended.left)), "0", not ended.left)
    for name, several in (
        ("two processes (FSDP), one of them killed", together),
        ("three processes (tensor parallel)", cut),
    ):
        difference = largest_difference(alone, several)
        bar(
            f"{name}, against one: largest difference of a weight",
            f"{difference:.1e}",
            f"< {_MAX_WEIGHT_DIFFERENCE:.0e}",
            difference < _MAX_WEIGHT_DIFFERENCE,
        )
    scratch = _FOLDER / "scratch"
    bar("export, loaded: logits", *_claim(export_is_exact(out, embedding, scratch / "export")))
    bar("without d2t", *_claim(missing_offsets_are_refused(out, scratch / "refused"), "refused"))
    difference = unrolled_difference(out, embedding)
    bar(
        "unrolled against step by step: largest difference of a logit",
        f"{difference:.1e}",
        f"< {_MAX_DIFFERENCE:.0e}",
        difference < _MAX_DIFFERENCE,
    )
    if served:
        _sglang_bars(served, bar)
    _show(console, lengths, report, bars)
    _REPORT.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cpu_count": os.cpu_count(), "platform": platform.platform()}
    seconds = time.monotonic() - started
    document = {
        "machine": machine,
        "seconds": seconds,
        "lengths": lengths,
        "job": report,
        "bars": bars,
    }
    _REPORT.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    console.print(f"written: {_REPORT}, after {seconds:.0f} s")
    return 0 if all(row["holds"] for row in bars.values()) else 1


def _in_sglang(console: Console, out: Path, prompts: Sequence[str]) -> HeadInSGLang | None:
    """What SGLang makes of the export, where it is installed."""
    python = os.environ.get("SGLANG_PYTHON")
    if not python:
        console.print("left out: make test-sglang builds the environment that this needs")
        return None
    scratch = _FOLDER / "sglang"
    model = write_dense_model(scratch / "model")
    tokenizer = Tokenizer.load(model)
    return head_in_sglang(
        python,
        model,
        out / "draft",
        [tokenizer.encode_chat([ChatTurn("user", prompt)]) for prompt in prompts],
        max_tokens=32,
        num_steps=_NUM_DRAFT_TOKENS,
        scratch=scratch / "run",
    )


def _sglang_bars(served: HeadInSGLang, bar: Callable[[str, object, str, bool], None]) -> None:
    largest = served.largest_difference
    bar(
        f"in SGLang: largest difference of a logit, of {sum(served.num_rows)} rows",
        f"{largest:.1e}",
        f"< {_MAX_SGLANG_DIFFERENCE:.0e}",
        largest < _MAX_SGLANG_DIFFERENCE,
    )
    for name, value, wanted in (
        ("rounds of verification, against ours", served.num_rounds, served.num_own_rounds),
        ("tokens that plain decoding would not give", served.num_other_tokens, 0),
    ):
        bar(f"in SGLang: {name}", str(value), str(wanted), value == wanted)


def _went_on(said: str) -> bool:
    """Whether processes began twice, the second time from a checkpoint."""
    return said.count("training in 2 of 2 processes") == 2 and "going on behind step" in said


def _claim(holds: bool, wanted: str = "equal") -> tuple[str, str, bool]:
    return wanted if holds else f"not {wanted}", wanted, holds


def _show(
    console: Console,
    lengths: dict[str, float],
    report: dict[str, Any],
    bars: dict[str, dict[str, Any]],
) -> None:
    stages = Table("stage", "tokens", "seconds", "tokens/s")
    last = report["curve"][-1]
    for name, num_tokens, seconds in (
        ("answers", report["answers"]["num_tokens"], report["answers"]["seconds"]),
        ("features", report["features"]["num_tokens"], report["features"]["seconds"]),
        ("training", last["num_tokens"], last["seconds"]),
    ):
        stages.add_row(name, str(num_tokens), f"{seconds:.0f}", f"{num_tokens / seconds:.0f}")
    console.print(stages)
    table = Table("head", "tokens a round of 3 commits, held out")
    for name, length in lengths.items():
        table.add_row(name, f"{length:.3f}")
    console.print(table)
    verdicts = Table("claim", "measured", "bar", "")
    for name, row in bars.items():
        verdicts.add_row(name, row["value"], row["bar"], "holds" if row["holds"] else "FAILS")
    console.print(verdicts)


if __name__ == "__main__":
    sys.exit(main())
