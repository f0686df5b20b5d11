"""The benchmark's rows, bars, tables and plot."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.bench.train.work import Trained

_STAGES = {
    "answers": ("plain_decode_rate", "plain decoding"),
    "features": ("disk_write_rate", "disk, writing"),
    "training": ("disk_read_rate", "disk, reading"),
}
"""Each with the limit that is not one of arithmetic."""
_MODES = ("offline", "online")


class Bar(NamedTuple):
    """A claim, and what was measured of it; it holds up to ``most``."""

    title: str
    value: float
    most: float

    @property
    def holds(self) -> bool:
        """Whether it is kept."""
        return self.value <= self.most


def stage_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of each stage, beside its limits: all in tokens a second."""
    rows = []
    for stage, (other, title) in _STAGES.items():
        timed = [repetition[stage] for repetition in found["stages"]]
        pairs = list(zip(timed, found["limits"], strict=True))
        row: dict[str, Any] = {
            "stage": stage,
            "tokens_per_s": median(each.rate for each in timed),
            "mflop_per_token": median(each.flops / each.num_tokens for each in timed) / 1e6,
            "arithmetic_limit": median(
                limits["matmul_flops"] * each.num_tokens / each.flops for each, limits in pairs
            ),
            "of_arithmetic": median(
                each.flops / each.seconds / limits["matmul_flops"] for each, limits in pairs
            ),
            "other_is": title,
            "other_limit": median(limits[other] for limits in found["limits"]),
            "of_other": median(each.rate / limits[other] for each, limits in pairs),
            "samples": [each.rate for each in timed],
        }
        rows.append(row)
    return rows


def mode_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Medians of a whole training, from answers to weights."""
    rows = []
    for mode in _MODES:
        runs: list[Trained] = [repetition[mode] for repetition in found["modes"]]
        rows.append(
            {
                "mode": mode,
                "tokens_per_s": median(run.num_tokens / run.seconds for run in runs),
                "peak_rss_mb": max(run.peak_bytes for run in runs) / 1e6,
                "grown_mb": max(run.grown_bytes for run in runs) / 1e6,
                "parts": {name: median(run.parts[name] for run in runs) for name in runs[0].parts},
                "samples": [run.num_tokens / run.seconds for run in runs],
            }
        )
    return rows


def bars_of(found: dict[str, Any]) -> list[Bar]:
    """What must hold whatever the machine."""
    differing = sum(
        not torch.equal(weight, repetition["online"].weights[name])
        for repetition in found["modes"]
        for name, weight in repetition["offline"].weights.items()
    )
    shares = [
        run.parts["queue_most_bytes"] / run.parts["queue_max_bytes"]
        for run in (repetition["online"] for repetition in found["modes"])
    ]
    return [
        Bar("weights that differ between online and offline", differing, 0),
        Bar("the queue's most bytes, of its bound", max(shares), 1),
    ]


def show(
    stages: Sequence[dict[str, Any]], modes: Sequence[dict[str, Any]], bars: Sequence[Bar]
) -> None:
    """Print everything."""
    console = Console(width=150)
    console.print(_table("stages and their limits, tokens/s; medians", stages))
    console.print(_table("answers to weights; medians, memory the most of all", modes))
    for row in modes:
        parts = ", ".join(f"{name} {_text(value)}" for name, value in row["parts"].items())
        console.print(f"{row['mode']}: {parts}")
    for bar in bars:
        word = "holds" if bar.holds else "FAILS"
        console.print(f"{word}  {bar.value:g} (at most {bar.most:g})  {bar.title}", markup=False)


def draw(stages: Sequence[dict[str, Any]], modes: Sequence[dict[str, Any]], path: Path) -> None:
    """Rates beside their limits on the left; both modes, rate and memory, on the right."""
    figure, (speed, whole, memory) = plt.subplots(
        1, 3, figsize=(13, 4.2), width_ratios=(2, 1, 1), layout="constrained"
    )
    kinds = (("arithmetic_limit", "limit: arithmetic"), ("other_limit", "limit: decoding or disk"))
    places = range(len(stages))
    for shift, (name, label) in enumerate((("tokens_per_s", "measured"), *kinds)):
        at = [place + (shift - 1) * 0.27 for place in places]
        bars = speed.bar(at, [row[name] for row in stages], 0.25, label=label)
        speed.bar_label(bars, fmt=_text, fontsize=8)
    speed.set_yscale("log")
    speed.set_ylabel("tokens/s")
    speed.set_xticks(places, [f"{row['stage']}\n({row['other_is']})" for row in stages])
    speed.legend(frameon=False, fontsize=8)
    names = [row["mode"] for row in modes]
    for axes, key, title in (
        (whole, "tokens_per_s", "answers to weights, tokens/s"),
        (memory, "grown_mb", "memory beyond the models, MB"),
    ):
        bars = axes.bar(names, [row[key] for row in modes], color=["C0", "C2"])
        axes.bar_label(bars, fmt=_text, fontsize=8)
        axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title)
    columns = [name for name in rows[0] if name not in ("samples", "parts")]
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_text(row[name]) for name in columns))
    return table


def _text(value: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
