"""The benchmark's table, bars and picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from tests.bench.engine.race import WIDTHS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_BEST = "paceline bfloat16, file"
_SPEEDS = (
    "decode, context 128",
    "decode, context 1024",
    "decode, batch 8",
    "decode, batch 32",
    "prefill 1024",
    "prefill 4096",
)


def hold_bars(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each bar's name -> value, bar, holds; of the peers that were measured."""
    speed = {row["name"]: row["tok_per_s"] for row in rows}
    bars: dict[str, dict[str, Any]] = {}

    def at_least(ours: str, peer: str, measure: str, bar: float) -> None:
        for name in speed:
            if ours in speed and name.startswith(peer) and measure in speed[name]:
                value = speed[ours][measure] / speed[name][measure]
                title = f"{measure}: {ours} against {name}"
                bars[title] = {"value": value, "bar": bar, "holds": value >= bar}

    at_least(_BEST, "OpenVINO", "decode, context 128", 1.3)
    at_least(_BEST, "OpenVINO", "decode, context 1024", 1.1)
    for measure in _SPEEDS:
        for form in ("bfloat16, dense", "float32, dense"):
            at_least(f"paceline {form}", f"transformers {form}", measure, 1.0)
    return bars


def show(rows: Sequence[dict[str, Any]], bars: dict[str, dict[str, Any]]) -> None:
    """Print everything."""
    console = Console(width=170)
    table = Table(title="tokens per second, best of the rounds")
    for column in ("contestant", *_SPEEDS, "start s", "resident MB", "peak MB"):
        table.add_column(column)
    for row in rows:
        speeds = [f"{row['tok_per_s'][m]:.0f}" if m in row["tok_per_s"] else "-" for m in _SPEEDS]
        facts = [f"{row[fact]:.0f}" for fact in ("startup_s", "resident_mb", "peak_mb")]
        table.add_row(f"{row['name']} ({row['version']})", *speeds, *facts)
    console.print(table)
    widths = Table(title="milliseconds of one forward behind 512 tokens, by its tokens")
    for column in ("contestant", *map(str, WIDTHS)):
        widths.add_column(column)
    for row in rows:
        if row["forward_ms"]:
            widths.add_row(row["name"], *(f"{row['forward_ms'][str(w)]:.1f}" for w in WIDTHS))
    console.print(widths)
    for name, bar in bars.items():
        sign = "holds" if bar["holds"] else "FAILS"
        console.print(f"{sign}  {bar['value']:.2f} (bar {bar['bar']})  {name}")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG."""
    figure, (decode, prefill, width) = plt.subplots(1, 3, figsize=(17, 5))
    for axes, measures in ((decode, _SPEEDS[:4]), (prefill, _SPEEDS[4:])):
        for number, row in enumerate(rows):
            places = [
                m + number * 0.11 for m, name in enumerate(measures) if name in row["tok_per_s"]
            ]
            heights = [row["tok_per_s"][name] for name in measures if name in row["tok_per_s"]]
            axes.bar(places, heights, 0.1, label=row["name"])
        axes.set_xticks([m + 0.35 for m in range(len(measures))], measures, fontsize=8)
        axes.set_ylabel("tokens per second")
    decode.legend(fontsize=7)
    for row in rows:
        if row["forward_ms"]:
            width.plot(WIDTHS, [row["forward_ms"][str(w)] for w in WIDTHS], "o-", label=row["name"])
    width.set_xscale("log", base=2)
    width.set_xlabel("tokens of one forward behind 512")
    width.set_ylabel("ms")
    width.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
