"""What pages from a tier promise, as ratios to the same run without any."""

from __future__ import annotations

from typing import Any

_MAX_OF_COLD = {"valkey": 0.1, "ssd": 0.15}
_LENGTH = 4096
_MAX_OVERHEAD = 1.03
_MIN_OF_UNDISTURBED = 0.9


def hold_bars(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each bar's name -> value, bar, holds; of what was measured."""
    bars: dict[str, dict[str, Any]] = {}
    for row in report["ttft"]:
        name = f"{row['tokens']} tokens, {row['hits']:.0%} from {row['source']}, of cold"
        value = row["of_cold"]
        if row["hits"] == 1.0 and row["tokens"] == _LENGTH and row["source"] in _MAX_OF_COLD:
            bar = _MAX_OF_COLD[row["source"]]
            bars[name] = {"value": value, "bar": bar, "holds": value <= bar}
        if row["hits"] == 0.0:
            bars[name] = {"value": value, "bar": _MAX_OVERHEAD, "holds": value <= _MAX_OVERHEAD}
    value = report["neighbours"]["of_undisturbed"]
    bars["decode rate beside a load per second, of undisturbed"] = {
        "value": value,
        "bar": _MIN_OF_UNDISTURBED,
        "holds": value >= _MIN_OF_UNDISTURBED,
    }
    return bars
