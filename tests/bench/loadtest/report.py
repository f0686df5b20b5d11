"""The load test's tables and picture."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_COLOURS = {"http": "#1f6feb", "grpc": "#2f7d4f"}


def show(report: Mapping[str, Any]) -> None:
    """Print everything."""
    console = Console(width=200)
    capacity = report["capacity"]
    console.print(
        f"capacity: {capacity['requests_per_s']:.2f} requests/s, "
        f"{capacity['output_tokens_per_s']:.0f} output tokens/s "
        f"({capacity['num_clients']} clients that never pause)"
    )
    console.print(_step_table(report["steps"]))
    if report["checks"]:
        console.print(_check_table(report["checks"]))
    for title, bar in report["bars"].items():
        if bar["holds"] is None:
            console.print(f"not measured  {title}: {bar['why']}", markup=False)
            continue
        word = "holds" if bar["holds"] else "FAILS"
        console.print(f"{word}  {bar['value']:.3f} (bar {bar['bar']:g})  {title}", markup=False)


def _step_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="one schedule, its requests through both surfaces in turn; ms")
    columns = ("of capacity", "surface", "requests", "good", "rejected", "broken")
    for name in (*columns, "tokens/s", "first text p50 p99", "a token p50 p99", "late p99"):
        table.add_column(name, justify="right")
    for step in steps:
        for surface, told in step["report"]["surfaces"].items():
            cells = ("num_requests", "num_good", "num_rejected")
            table.add_row(
                f"{step['share']:g}",
                surface,
                *(str(told[cell]) for cell in cells),
                str(told["num_failed"] - told["num_rejected"]),
                f"{told['output_tokens_per_s']:.0f}",
                _cuts(told["ttft_s"], "p50", "p99"),
                _cuts(told["tpot_s"], "p50", "p99"),
                _cuts(told["lateness_s"], "p99"),
            )
    return table


def _check_table(checks: Sequence[Mapping[str, Mapping[str, float]]]) -> Table:
    table = Table(title="the same schedule sent by both tools in turn; medians of the rounds")
    table.add_column("measure")
    tools = list(checks[0])
    for tool in tools:
        table.add_column(tool, justify="right")
    for measure in checks[0]["aiperf"]:
        values = (
            [check[tool][measure] for check in checks if measure in check[tool]] for tool in tools
        )
        table.add_row(measure, *(f"{median(told):.2f}" if told else "-" for told in values))
    return table


def _cuts(spread: Mapping[str, Any], *names: str) -> str:
    found = spread["percentiles"]
    return "  ".join(f"{1000 * found[name]:.0f}" for name in names) if found else "-"


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: time to the first text and good requests, by offered load."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for surface, colour in _COLOURS.items():
        told = [
            (step["rate"], step["report"]["surfaces"][surface])
            for step in report["steps"]
            if surface in step["report"]["surfaces"]
        ]
        seen = [(rate, own) for rate, own in told if own["ttft_s"]["percentiles"]]
        for cut, style in (("p50", "-"), ("p99", "--")):
            left.plot(
                [rate for rate, _ in seen],
                [own["ttft_s"]["percentiles"][cut] for _, own in seen],
                style,
                marker="o",
                color=colour,
                label=f"{surface}, {cut}",
            )
        right.plot(
            [rate for rate, _ in told],
            [own["goodput_share"] for _, own in told],
            marker="o",
            color=colour,
            label=surface,
        )
    for axes, label in ((left, "seconds to the first text"), (right, "share of good requests")):
        axes.axvline(
            report["capacity"]["requests_per_s"], color="#777777", ls=":", label="capacity"
        )
        axes.set_xlabel("requests / s offered")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
