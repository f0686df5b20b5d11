"""What must hold at the machine's capacity, and how closely a second tool must agree."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_AGREEMENT = 0.05
_GOOD_SHARE = 0.9
_COMFORTABLE = 0.8
"""Of the capacity: up to here requests must be good, up to all of it none may fail."""


def hold_bars(
    steps: Sequence[dict[str, Any]], checks: Sequence[dict[str, dict[str, float]]], absent: str
) -> dict[str, dict[str, Any]]:
    """Each bar's name -> value, bar, holds.

    Args:
        steps: by share of the capacity, each with the ``report`` of its load.
        checks: pairs of runs of one schedule, by tool and measure, and what passed on the wire
            during each; see ``wire``.
        absent: why there are no checks; they neither hold nor fail then.
    """
    bars: dict[str, dict[str, Any]] = {}

    def bar(name: str, value: float, limit: float, *, holds: bool) -> None:
        bars[name] = {"value": value, "bar": limit, "holds": holds}

    for step in steps:
        share = step["share"]
        for surface, summary in step["report"]["surfaces"].items():
            at = f"{surface} at {share:g} of the capacity"
            num_broken = summary["num_failed"] - summary["num_rejected"]
            bar(f"{at}: requests that broke", num_broken, 0, holds=num_broken == 0)
            if share <= 1:
                refused = summary["num_rejected"]
                bar(f"{at}: requests refused", refused, 0, holds=refused == 0)
            if share <= _COMFORTABLE:
                good = summary["goodput_share"]
                bar(f"{at}: share of good requests", good, _GOOD_SHARE, holds=good >= _GOOD_SHARE)
    if not checks:
        bars["agreement with aiperf"] = {
            "value": None,
            "bar": _AGREEMENT,
            "holds": None,
            "why": absent,
        }
        return bars
    for measure in checks[0]["paceline"]:
        ratios = [
            _seen(check, "paceline", measure) / _seen(check, "aiperf", measure) for check in checks
        ]
        off = median(ratios) - 1
        name = f"{measure}: bench serve over aiperf, less 1"
        bar(name, off, _AGREEMENT, holds=abs(off) <= _AGREEMENT)
    return bars


def _seen(check: dict[str, dict[str, float]], tool: str, measure: str) -> float:
    """What a tool saw; of times, over what the same requests took on the wire."""
    return check[tool][measure] / check[f"wire of {tool}"].get(measure, 1.0)
