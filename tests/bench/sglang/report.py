"""The benchmark's table and picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from tests.bench.sglang.field import NGRAM, NGRAM_NARROW, NONE, POOL, SERVED, WRONG

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_COLOURS = {
    NONE: "#a8b1bd",
    POOL: "#6ea8fe",
    SERVED: "#1f6feb",
    WRONG: "#c2410c",
    NGRAM: "#d4a373",
    NGRAM_NARROW: "#d29922",
}
_HIDDEN = {"ratios"}


def show(
    rows: Sequence[dict[str, Any]],
    stalls_ms: Mapping[str, float],
    absent: Mapping[str, str],
    bars: Mapping[str, dict[str, Any]],
) -> None:
    """Print everything."""
    console = Console(width=200, highlight=False)
    if rows:
        console.print(_table(rows))
    for name, stall_ms in stalls_ms.items():
        console.print(f"{stall_ms:.3f} ms that drafts add to a step, median: {name}")
    for name, reason in absent.items():
        console.print(f"does not run: {name}: {reason}", markup=False)
    for name, bar in bars.items():
        if bar["holds"] is None:
            console.print(f"NOT MEASURED (bar {bar['bar']})  {name}", markup=False)
            continue
        word = "holds" if bar["holds"] else "FAILS"
        console.print(f"{word}  {bar['value']:.4g} (bar {bar['bar']})  {name}", markup=False)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: speed over that without drafts, every question a dot, one panel per load."""
    loads = list(dict.fromkeys((row["prompts"], row["batch"]) for row in rows))
    figure, panels = plt.subplots(
        1, max(1, len(loads)), figsize=(4.2 * max(1, len(loads)), 3.8), sharey=True, squeeze=False
    )
    for panel, load in zip(panels[0], loads, strict=False):
        own = [row for row in rows if (row["prompts"], row["batch"]) == load]
        for place, row in enumerate(own):
            colour = _COLOURS[row["contestant"]]
            panel.bar(place, row["ratio"], 0.72, color=colour)
            panel.plot([place] * len(row["ratios"]), row["ratios"], ".", color="#333333")
            text = f"{row['tokens_per_s']:.1f}"
            if row["accept_length"] is not None:
                text += f"\n({row['accept_length']:.2f})"
            panel.text(place, 0.02, text, ha="center", va="bottom", fontsize=8)
        names = [row["contestant"].replace(", ", ",\n") for row in own]
        panel.set_xticks(range(len(own)), names, rotation=35, ha="right", fontsize=8)
        panel.axhline(1.0, color="#888888", linewidth=1)
        panel.axhline(0.95, color="#c2410c", linewidth=1, linestyle=":")
        panel.set_title(f"{load[0]}, batch {load[1]}", fontsize=10)
    panels[0][0].set_ylabel("speed over none; tokens/s (accept length)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = [name for name in rows[0] if name not in _HIDDEN]
    table = Table(title="medians over questions; ratio to none at the same question")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_text(row[name]) for name in columns))
    return table


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
