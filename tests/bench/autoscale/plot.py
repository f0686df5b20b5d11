"""One picture of both runs: what was asked and held the SLO, and the replicas it took."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from tests.bench.autoscale.report import POOLS

if TYPE_CHECKING:
    from pathlib import Path

_COLOURS = {"target": "#35618e", "draft": "#c07a2c"}
_RUNS = (("autoscaled", "-"), ("static", ":"))


def draw(report: dict[str, Any], path: Path) -> bool:
    """Draw the report of ``compare``.

    Args:
        report: with both runs and the plan.
        path: of the PNG file.

    Returns:
        False, and nothing drawn, without matplotlib.
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    requests, goodput, replicas = figure.subplots(3, 1, sharex=True)
    for name, style in _RUNS:
        run = report[name]
        steps = run["timeline"]
        at_s = [step["at_s"] for step in steps]
        width = at_s[1] - at_s[0] if len(at_s) > 1 else 1.0
        if name == "autoscaled":
            due = [step["due"] / width for step in steps]
            requests.step(at_s, due, where="post", color="#9bb5cf", label="due")
        good = [step["good"] / width for step in steps]
        requests.step(
            at_s, good, where="post", color="#2f7d4f", linestyle=style, label=f"good, {name}"
        )
        shares = [step["good"] / step["due"] if step["due"] else None for step in steps]
        goodput.step(at_s, shares, where="post", color="#2f7d4f", linestyle=style, label=name)
        for pool in POOLS:
            replicas.step(
                [sample["at_s"] for sample in run["replicas"]],
                [sample["replicas"].get(pool, 0) for sample in run["replicas"]],
                where="post",
                color=_COLOURS[pool],
                linestyle=style,
                label=f"{pool}, {name}",
            )
    update = report["autoscaled"]["is_updated"]
    if isinstance(update, dict):
        replicas.axvspan(
            update["began_s"], update["ended_s"], color="#dddddd", label="rolling update"
        )
    requests.set_ylabel("requests / s")
    goodput.set_ylabel("part within the SLO")
    replicas.set_ylabel("replicas held")
    replicas.set_xlabel("seconds")
    for axes in (requests, goodput, replicas):
        axes.legend(loc="upper right", frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    return True
