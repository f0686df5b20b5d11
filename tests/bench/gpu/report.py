"""The GPU benchmark's tables and plot."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tests.bench.gpu.field import PLAIN
from tests.bench.kv.table import print_table

if TYPE_CHECKING:
    from pathlib import Path


def add_speed_ups(rows: list[dict[str, Any]]) -> None:
    """Beside the plain contestant on the same questions: more tokens, an earlier first token."""
    plain = {(row["what"], row["batch"]): row for row in rows if row["contestant"] == PLAIN}
    for row in rows:
        other = plain[row["what"], row["batch"]]
        if row["tokens_per_s"]:
            row["of_plain"] = row["tokens_per_s"] / other["tokens_per_s"]
        else:
            row["of_plain"] = other["first_token_s"] / row["first_token_s"]


def show(report: dict[str, Any]) -> None:
    """Print everything."""
    acceptance = "" if report["acceptance_counts"] else "; random weights: no drafter can know them"
    drafts = report["draft"]["drafter"]
    title = f"{report['target']} on {report['device']}, drafts: {drafts}{acceptance}"
    print_table(title, report["rows"])
    for name, reason in report["absent"].items():
        sys.stdout.write(f"did not run: {name}: {reason}\n")


def draw(report: dict[str, Any], path: Path) -> None:
    """Tokens per second by batch for each kind of question, and first tokens of long prompts."""
    # The only part that needs it, and none that a test needs.
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    rows = report["rows"]
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    kinds = list(dict.fromkeys(row["what"] for row in rows if row["tokens_per_s"]))
    figure, grid = plt.subplots(1, len(kinds) + 1, figsize=(4 * (len(kinds) + 1), 3.6))
    for axes, kind in zip(grid, kinds, strict=False):
        for name in names:
            own = [row for row in rows if row["contestant"] == name and row["what"] == kind]
            batches = [row["batch"] for row in own]
            axes.plot(batches, [row["tokens_per_s"] for row in own], marker="o", label=name)
        axes.set(title=kind, xlabel="sequences", ylabel="tokens/s", ylim=(0, None))
    grid[0].legend(frameon=False, fontsize=7)
    waits = [row for row in rows if not row["tokens_per_s"]]
    labels = [f"{row['contestant']}\n{row['what']}" for row in waits]
    grid[-1].barh(labels, [row["first_token_s"] * 1e3 for row in waits])
    grid[-1].set(xlabel="ms to the first token")
    grid[-1].tick_params(axis="y", labelsize=6)
    figure.suptitle(f"{report['target']} on {report['device']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
