"""Figures of each way, the table, the picture."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from tests.bench.gateway.bars import DEFAULT, PACELINE
from tests.bench.gateway.measure import percentile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.bench.gateway.measure import Row

_CUTS = (10, 50, 95, 99)
_COLOURS = {PACELINE: "#1f6feb", DEFAULT: "#a8b1bd"}


def summaries(rows: Mapping[str, Row]) -> dict[str, dict[str, Any]]:
    """By way: percentiles to the first piece and to the end, the median item, processor time."""
    return {
        name: {
            "num_requests": len(row.first_s) + len(row.errors),
            "num_failed": len(row.errors),
            "errors": row.errors[:3],
            "first_ms": _cuts(row.first_s),
            "whole_ms": _cuts(row.whole_s),
            "item_ms": median(row.item_s) * 1000 if row.item_s else None,
            "cpu_ms": _ms(row.cpu_s),
            "item_cpu_us": {role: 1000 * spent for role, spent in _ms(row.item_cpu_s).items()},
        }
        for name, row in rows.items()
    }


def show(ways: Mapping[str, dict[str, Any]], bars: Mapping[str, dict[str, Any]]) -> None:
    """Print everything."""
    table = Table(title="one token at 50 requests/s; milliseconds, processor time by process")
    table.add_column("way")
    for name in ("first p50", "p95", "p99", "end p50", "p99", "per item", "failed"):
        table.add_column(name, justify="right")
    table.add_column("CPU of a request")
    table.add_column("CPU of an item, us")
    for name, way in ways.items():
        first, whole, item = way["first_ms"], way["whole_ms"], way["item_ms"]
        cells = [first["p50"], first["p95"], first["p99"], whole["p50"], whole["p99"]]
        table.add_row(
            name,
            *(f"{cell:.2f}" for cell in cells),
            "-" if item is None else f"{item:.3f}",
            str(way["num_failed"]),
            _parts(way["cpu_ms"], 2),
            _parts(way["item_cpu_us"], 0),
        )
    console = Console(width=220)
    console.print(table)
    for title, bar in bars.items():
        word = "holds" if bar["holds"] else "FAILS"
        console.print(f"{word}  {bar['value']:.3f} (bar {bar['bar']:g})  {title}", markup=False)


def draw(ways: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Write a PNG: time to the first token from p50 to p99, and time per item."""
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.9 + 0.42 * len(ways)))
        _bars(left, list(ways), [way["first_ms"]["p50"] for way in ways.values()])
        for place, way in enumerate(ways.values()):
            reach = (way["first_ms"]["p50"], way["first_ms"]["p99"])
            left.plot(reach, (place, place), color="#333333", marker="|")
        left.set_xlabel("ms to the first token, p50, and line to p99")
        streamed = {name: way for name, way in ways.items() if way["item_ms"] is not None}
        _bars(right, list(streamed), [way["item_ms"] for way in streamed.values()])
        right.set_xlabel("ms per streamed item")
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _bars(axes: Any, names: Sequence[str], values: Sequence[float]) -> None:
    colours = [_COLOURS.get(name.partition(",")[0], "#2f7d4f") for name in names]
    axes.barh(range(len(names)), values, 0.7, color=colours)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()


def _cuts(values: Sequence[float]) -> dict[str, float]:
    return {f"p{cut}": 1000 * percentile(values, cut) for cut in _CUTS} if values else {}


def _ms(spent: Mapping[str, float]) -> dict[str, float]:
    return {role: 1000 * seconds for role, seconds in sorted(spent.items())}


def _parts(spent: Mapping[str, float], digits: int) -> str:
    return ", ".join(f"{role} {value:.{digits}f}" for role, value in spent.items())
