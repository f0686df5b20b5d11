"""The benchmark's table and plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from tests.bench.split.modes import Mode

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.bench.split.bars import Bar

_COLOURS = {
    Mode.LOCAL: "#8b949e",
    Mode.COLOCATED: "#2da44e",
    Mode.CHAIN: "#116329",
    Mode.SYNC: "#d29922",
    Mode.PULL: "#a371f7",
    Mode.PUSH: "#6ea8fe",
    Mode.SPLIT: "#1f6feb",
}
_HIDDEN = {"samples", "acceptance_histogram"}


def show(rows: Sequence[dict[str, Any]], bars: Sequence[Bar]) -> None:
    """Print everything."""
    columns = [name for name in rows[0] if name not in _HIDDEN]
    table = Table(title="speed-up over plain decoding right beside it; r in steps (T)")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_text(row[name]) for name in columns))
    console = Console(width=220)
    console.print(table)
    for bar in bars:
        word = "holds" if bar.holds else "FAILS"
        console.print(f"{word}  {bar.value:.3f} (bar {bar.least:g})  {bar.title}", markup=False)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Speed-up by distance on the simulated clock above, by batch at this machine's speed below."""
    names = list(dict.fromkeys(row["prompts"] for row in rows))
    figure, grid = plt.subplots(
        2, len(names), figsize=(3.6 * len(names), 6.4), sharey="row", squeeze=False
    )
    for column, name in enumerate(names):
        own = [row for row in rows if row["prompts"] == name]
        paced = [row for row in own if row["clock"] == "simulated"]
        smallest = min((row["batch"] for row in paced), default=1)
        paced = [row for row in paced if row["batch"] == smallest]
        above, below = grid[0][column], grid[1][column]
        _lines(above, paced, "round_trip", with_model=True)
        _lines(below, [row for row in own if row["clock"] == "own"], "batch", with_model=False)
        above.set_title(f"{name}, batch {smallest}, simulated clock", fontsize=9)
        above.set_xlabel("round trip / target step")
        below.set_title(f"{name}, this machine", fontsize=9)
        below.set_xlabel("batch")
    for axes in grid[:, 0]:
        axes.set_ylabel("speed-up over plain")
    measured = [axes for axes in grid[:, 0] if axes.get_legend_handles_labels()[0]]
    measured[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(axes: Any, rows: Sequence[dict[str, Any]], by: str, *, with_model: bool) -> None:
    axes.axhline(1.0, color="#888888", linewidth=1)
    for mode, colour in _COLOURS.items():
        own = [row for row in rows if row["mode"] == mode]
        if not own:
            continue
        places = [row[by] for row in own]
        axes.plot(
            places, [row["speed_up"] for row in own], marker="o", color=colour, label=mode.value
        )
        if with_model and all(row["model_speed_up"] is not None for row in own):
            axes.plot(places, [row["model_speed_up"] for row in own], color=colour, linestyle=":")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
