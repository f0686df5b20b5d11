"""The drill's table, bars and picture."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_RECOVERY_S = 5.0
MIN_SHARE_OF_PLAIN = 0.9
_BIN_S = 0.5


def bars_of(
    rows: Sequence[dict[str, Any]], plain_tokens_per_s: float, num_failed: int, num_wrong: int
) -> dict[str, dict[str, Any]]:
    """Each with its value and whether it holds."""
    # A swap has no time without a drafter.
    dips = [row["tokens_per_s_during"] for row in rows if row["fault"] != "swap"]
    recoveries = [row["recovery_s"] for row in rows]
    slowest = None if None in recoveries else max(recoveries)
    dip = min(dips) / plain_tokens_per_s if dips else None
    return {
        "requests that failed": {"value": num_failed, "bar": "0", "holds": num_failed == 0},
        "texts that differ from plain decoding": {
            "value": num_wrong,
            "bar": "0",
            "holds": num_wrong == 0,
        },
        "seconds until tables give half as many tokens as before, once the drafter is back": {
            "value": slowest,
            "bar": f"at most {MAX_RECOVERY_S:g}",
            "holds": slowest is not None and slowest <= MAX_RECOVERY_S,
        },
        "throughput under a fault, of plain decoding": {
            "value": dip,
            "bar": f"at least {MIN_SHARE_OF_PLAIN:g}",
            "holds": dip is None or dip >= MIN_SHARE_OF_PLAIN,
        },
    }


def draw(rows: Sequence[dict[str, Any]], plain_tokens_per_s: float, path: Path) -> None:
    """Tokens per second over time, all of them and those from tables, around each fault."""
    figure, grid = plt.subplots(len(rows), 1, figsize=(8, 1.9 * len(rows)), squeeze=False)
    for axes, row in zip(grid[:, 0], rows, strict=True):
        axes.axvspan(0.0, row["lasted_s"], color="#f2cc60", alpha=0.4)
        axes.axhline(plain_tokens_per_s, color="#888888", linewidth=1, label="plain decoding")
        for column, colour, label in ((1, "#1f6feb", "tokens"), (2, "#2da44e", "from tables")):
            places, rates = _rates(row["samples"], column)
            axes.plot(places, rates, color=colour, label=label)
        axes.set_title(f"{row['how']}, {row['replicas']} draft replica(s)", fontsize=9)
        axes.set_ylabel("per second")
        axes.set_ylim(bottom=0)
    grid[0][0].legend(frameon=False, fontsize=8)
    grid[-1][0].set_xlabel("seconds since the fault; shaded: without the drafter")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rates(samples: Sequence[Sequence[float]], column: int) -> tuple[list[float], list[float]]:
    chosen = [samples[0]]
    for sample in samples:
        if sample[0] >= chosen[-1][0] + _BIN_S:
            chosen.append(sample)
    places = [(one[0] + other[0]) / 2 for one, other in pairwise(chosen)]
    rates = [(other[column] - one[column]) / (other[0] - one[0]) for one, other in pairwise(chosen)]
    return places, rates
