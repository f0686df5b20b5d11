"""The benchmark's tables."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tests.bench.engine.race import ARRIVALS, WIDTHS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SPEEDS = (
    "decode, context 128",
    "decode, context 1024",
    "decode, batch 8",
    "decode, batch 32",
    "prefill 1024",
    "prefill 4096",
)
_FACTS = {"startup_s": "start s", "resident_mb": "resident MB", "peak_mb": "peak MB"}


def summary(samples: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Per measure the median, the least, the greatest and the number of samples."""
    return {
        name: {
            "median": median(values),
            "low": min(values),
            "high": max(values),
            "count": len(values),
        }
        for name, values in samples.items()
    }


def show(
    rows: Sequence[dict[str, Any]],
    bars: Mapping[str, dict[str, Any]],
    absent: Mapping[str, str],
) -> None:
    """Print everything."""
    console = Console(width=200, highlight=False)
    console.print(_speed_table(rows))
    console.print(_width_table(rows))
    for name, reason in absent.items():
        console.print(f"not measured: {name}: {reason}")
    show_bars(bars, console)


def show_bars(bars: Mapping[str, dict[str, Any]], console: Console) -> None:
    """One line per bar."""
    for name, bar in bars.items():
        if bar["holds"] is None:
            console.print(f"NOT MEASURED (bar {bar['bar']})  {name}  [{bar['why']}]", markup=False)
            continue
        sign = "holds" if bar["holds"] else "FAILS"
        console.print(f"{sign}  {bar['value']:.4g} (bar {bar['bar']})  {name}")


def _speed_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        title="tokens per second, median of the rounds (least-greatest); "
        "memory without KV where the contestant keeps a pool that can be told apart"
    )
    table.add_column("contestant")
    for column in (*SPEEDS, f"{ARRIVALS.name} ms, median (worst)", *_FACTS.values()):
        table.add_column(column, justify="right")
    for row in rows:
        samples = row["samples"]
        cells = [_spread(samples.get(name), 0 if "prefill" in name else 1) for name in SPEEDS]
        late = samples.get(ARRIVALS.name)
        cells.append(f"{median(late):.0f} ({max(late):.0f})" if late else "-")
        cells += [f"{row[fact]:.0f}" if fact in row else "-" for fact in _FACTS]
        table.add_row(f"{row['name']} ({row['version']})", *cells)
    return table


def _width_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="milliseconds of one forward behind 512 tokens, by its tokens")
    table.add_column("contestant")
    for width in WIDTHS:
        table.add_column(str(width), justify="right")
    for row in rows:
        cells = [_spread(row["samples"].get(f"forward {width}"), 1) for width in WIDTHS]
        if set(cells) != {"-"}:
            table.add_row(row["name"], *cells)
    return table


def _spread(values: Sequence[float] | None, digits: int) -> str:
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
