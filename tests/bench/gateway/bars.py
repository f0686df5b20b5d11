"""What the ingress promises: bounds on what it adds, and a ratio to Ray Serve's own proxy.

It adds to the engine asked by the same client: what a client and a socket cost is on both sides.
"""

from __future__ import annotations

from typing import Any

DIRECT = "engine in the caller"
BARE = "engine alone"
PACELINE = "paceline"
DEFAULT = "ray default"
SURFACES = ("HTTP", "gRPC")
KINDS = ("whole", "streamed")
_P50_MS, _P99_MS, _ITEM_MS, _RATIO = 2.0, 15.0, 0.1, 2.0


def hold_bars(ways: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each bar's name -> value, bar, holds.

    Answers that come whole are compared by their end, streamed ones by their first token.

    Args:
        ways: summaries by way; see ``report.summaries``.
    """
    bars: dict[str, dict[str, Any]] = {}
    for surface in SURFACES:
        for kind in KINDS:
            bare, ours, theirs = (
                ways[f"{gateway}, {surface}, {kind}"] for gateway in (BARE, PACELINE, DEFAULT)
            )
            title = f"{surface}, {kind}"
            for cut, bar in (("p50", _P50_MS), ("p99", _P99_MS)):
                added = ours["first_ms"][cut] - bare["first_ms"][cut]
                bars[f"{title}: {cut} over the engine, ms"] = _at_most(added, bar)
            added_by = [way["first_ms"]["p50"] - bare["first_ms"]["p50"] for way in (theirs, ours)]
            bars[f"{title}: {DEFAULT}'s p50 over ours"] = _at_least(added_by[0] / added_by[1])
            bars[f"{title}: failed requests"] = _at_most(ours["num_failed"], 0)
        bare, ours = (ways[f"{gateway}, {surface}, streamed"] for gateway in (BARE, PACELINE))
        added = ours["item_ms"] - bare["item_ms"]
        bars[f"{surface}: an item over the engine, ms"] = _at_most(added, _ITEM_MS)
    return bars


def _at_most(value: float, bar: float) -> dict[str, Any]:
    return {"value": value, "bar": bar, "holds": value <= bar}


def _at_least(value: float) -> dict[str, Any]:
    return {"value": value, "bar": _RATIO, "holds": value >= _RATIO}
