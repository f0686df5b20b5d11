"""The benchmark's picture."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

from tests.bench.engine.race import ARRIVALS, WIDTHS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

_PANELS = (
    ("decode, context 128", "tokens/s"),
    ("decode, context 1024", "tokens/s"),
    ("decode, batch 8", "tokens/s"),
    ("decode, batch 32", "tokens/s"),
    ("prefill 1024", "tokens/s"),
    ("prefill 4096", "tokens/s"),
    (ARRIVALS.name, "ms, lower is better"),
)
_OURS, _PEERS = "#1f6feb", "#a8b1bd"
_LINES = ("#1f6feb", "#6ea8fe", "#0b3d91", "#9ecbff", "#14b8a6")
_PEER_LINES = ("#6b7280", "#c2410c", "#d4a373")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: bars with whiskers from least to greatest, ours in colour, and the widths."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(2, 4, figsize=(19, 3.2 + 0.46 * len(rows)))
        for axes, (measure, unit) in zip(grid.flat, _PANELS, strict=False):
            _draw_measure(axes, rows, measure, unit)
        for axes in grid[:, 1:].flat:
            axes.set_yticklabels([])
        _draw_widths(grid.flat[-1], rows)
        figure.tight_layout(h_pad=2.0)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _draw_measure(axes: Axes, rows: Sequence[dict[str, Any]], measure: str, unit: str) -> None:
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        values = row["samples"].get(measure)
        if not values:
            axes.text(0, place, " not measured", va="center", fontsize=7, color="#888888")
            continue
        middle = median(values)
        reach = [[middle - min(values)], [max(values) - middle]]
        colour = _OURS if row["is_ours"] else _PEERS
        axes.barh(place, middle, 0.72, xerr=reach, color=colour, ecolor="#333333", capsize=2)
        axes.text(max(values), place, f"  {middle:.3g}", va="center", fontsize=8)
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_title(measure, fontweight="bold", loc="left")
    axes.set_xlabel(unit)


def _draw_widths(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    ours, peers = iter(_LINES), iter(_PEER_LINES)
    for row in rows:
        points = [row["samples"].get(f"forward {width}") for width in WIDTHS]
        if None in points:
            continue
        colour = next(ours if row["is_ours"] else peers, "#000000")
        axes.plot(WIDTHS, [median(each) for each in points], "o-", color=colour, label=row["name"])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(WIDTHS, map(str, WIDTHS))
    axes.set_title("one forward by its tokens", fontweight="bold", loc="left")
    axes.set_xlabel("tokens behind 512 of context")
    axes.set_ylabel("ms")
    if axes.lines:
        axes.legend(fontsize=7, frameon=False)
