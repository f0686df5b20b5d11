"""The report's picture: codec speed, GET speed and CPU, loss against ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG."""
    figure, (codecs, gets, loss) = plt.subplots(1, 3, figsize=(16, 5))
    rows = [row for row in report["codecs"] if row["page"] == "1.47 MB"]
    places = range(len(rows))
    for shift, kind in ((-0.2, "encode"), (0.2, "decode")):
        heights = [row[f"{kind}_gb_per_cpu_s"] for row in rows]
        codecs.bar([place + shift for place in places], heights, 0.4, label=kind)
    codecs.axhline(rows[0]["memcpy_gb_per_cpu_s"], color="grey", ls="--", label="memcpy")
    codecs.set_xticks(places, [row["codec"] for row in rows])
    codecs.set_ylabel("raw GB per CPU second")
    codecs.set_title("codecs, one core, pages of 1.47 MB")
    codecs.legend()
    for page, marker in (("1.47 MB", "o"), ("8 MiB", "s")):
        for number, row in enumerate(row for row in report["hot"] if row["page"] == page):
            gets.scatter(
                row["client_cpu_s_per_gb"],
                row["get_gb_per_s"],
                marker=marker,
                color=f"C{number}",
                label=f"{row['client']}, {page}",
            )
    gets.set_xlabel("client CPU seconds per GB")
    gets.set_ylabel("GB/s")
    gets.set_title("GET over loopback, at most 2 connections")
    gets.legend(fontsize=8)
    for number, row in enumerate(row for row in report["quality"] if row["kl"] > 0):
        loss.scatter(row["ratio"], row["kl"], color=f"C{number}", marker="o")
        loss.annotate(f"{row['codec']}, {row['text']}", (row["ratio"], row["kl"]), fontsize=8)
    if report["quality"]:
        loss.set_yscale("log")
    loss.set_xlabel("times smaller")
    loss.set_ylabel("KL, nats per token")
    loss.set_title("loss on SmolLM2-135M-Instruct")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
