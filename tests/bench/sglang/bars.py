"""What must hold in a run."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from tests.bench.sglang.field import POOL, SERVED, WRONG

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

OURS = (POOL, SERVED, WRONG)
_WRONG_AT_LEAST = 0.95
_STALL_AT_MOST_MS = 0.3
_ACCEPTS_AT_LEAST = 1.5


def hold_bars(
    names: Collection[str],
    rows: Sequence[dict[str, Any]],
    stalls_ms: Mapping[str, float],
    unexplained: Mapping[str, int],
) -> dict[str, dict[str, Any]]:
    """Each bar's name -> value, bar, holds; None where it could not be measured.

    Args:
        names: of the contestants that were to take part; the others have no bars.
        rows: of ``race.rows_of``.
        stalls_ms: by contestant with our algorithm, what drafts added to a step in the median.
        unexplained: by such contestant, texts that differ by more than rounding.
    """
    bars: dict[str, dict[str, Any]] = {}
    for batch in dict.fromkeys(row["batch"] for row in rows):
        ratios = [
            ratio
            for row in rows
            if (row["contestant"], row["batch"]) == (WRONG, batch)
            for ratio in row["ratios"]
        ]
        if WRONG not in names:
            continue
        name = f"always wrong drafts against none, batch {batch}"
        bars[name] = _bar(median(ratios) if ratios else None, _WRONG_AT_LEAST, is_least=True)
    for name in OURS:
        if name not in names:
            continue
        bars[f"ms that drafts add to a step: {name}"] = _bar(
            stalls_ms.get(name), _STALL_AT_MOST_MS, is_least=False
        )
        bars[f"texts that differ by more than rounding: {name}"] = _bar(
            unexplained.get(name), 0, is_least=False
        )
    if SERVED not in names:
        return bars
    accepts = [
        row["accept_length"]
        for row in rows
        if row["contestant"] == SERVED and row["prompts"] == "repeating"
    ]
    known = [each for each in accepts if each is not None]
    bars[f"tokens per verification of repeating prompts: {SERVED}"] = _bar(
        min(known) if known else None, _ACCEPTS_AT_LEAST, is_least=True
    )
    return bars


def _bar(value: float | None, bar: float, *, is_least: bool) -> dict[str, Any]:
    holds = None if value is None else value >= bar if is_least else value <= bar
    return {"value": value, "bar": bar, "holds": holds}
