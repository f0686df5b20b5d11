"""The report's picture: time to first token by share of hits, one panel per prompt length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG."""
    lengths = list(dict.fromkeys(row["tokens"] for row in report["ttft"]))
    figure, panels = plt.subplots(1, len(lengths), figsize=(5 * len(lengths), 4), squeeze=False)
    for panel, length in zip(panels[0], lengths, strict=True):
        for source in dict.fromkeys(row["source"] for row in report["ttft"]):
            rows = [
                row for row in report["ttft"] if (row["tokens"], row["source"]) == (length, source)
            ]
            panel.plot(
                [100 * row["hits"] for row in rows],
                [row["of_cold"] for row in rows],
                marker="o",
                label=source,
            )
        panel.axhline(1.0, color="grey", ls="--", label="cold")
        panel.set_ylim(bottom=0)
        panel.set_title(f"{length} tokens")
        panel.set_xlabel("pages in the tier, %")
        panel.set_ylabel("time to first token, of cold")
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
