"""The picture of a run; needs matplotlib."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def draw(report: dict[str, Any], path: Path) -> bool:
    """Draw arrivals, waiting times and replicas over time.

    Args:
        report: of ``paceline bench serve``.
        path: of the PNG file.

    Returns:
        False, and nothing drawn, without matplotlib.
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    steps, samples = report["timeline"], report["replicas"]
    figure = Figure(figsize=(9, 7 if samples else 5), layout="constrained")
    axes = figure.subplots(3 if samples else 2, 1, sharex=True, squeeze=False)[:, 0]
    at_s = [step["at_s"] for step in steps]
    width = at_s[1] - at_s[0] if len(at_s) > 1 else 1.0
    for name, colour in (("due", "#9bb5cf"), ("good", "#2f7d4f"), ("failed", "#b23a3a")):
        values = [step[name] / width for step in steps]
        axes[0].step(at_s, values, where="post", label=name, color=colour)
    axes[0].set_ylabel("requests / s")
    axes[0].legend(loc="upper right", frameon=False)
    waited = [step["ttft_s"] for step in steps]
    axes[1].step(at_s, waited, where="post", color="#35618e", label="median TTFT")
    if slo := report["slo"]["ttft_s"]:
        axes[1].axhline(slo, color="#777777", linestyle="--", label="SLO")
    axes[1].set_ylabel("seconds")
    axes[1].legend(loc="upper right", frameon=False)
    if samples:
        for name in sorted({name for sample in samples for name in sample["replicas"]}):
            counts = [sample["replicas"].get(name, 0) for sample in samples]
            times = [sample["at_s"] for sample in samples]
            axes[2].step(times, counts, where="post", label=name)
        axes[2].set_ylabel("replicas")
        axes[2].legend(loc="upper right", frameon=False)
    axes[-1].set_xlabel("seconds")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    return True
