"""What must hold in a run."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.split.modes import Mode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Row = dict[str, Any]

_BUDGETED = (Mode.LOCAL, Mode.SPLIT)
"""As served: what is verified, and how much, is decided by what it costs. A drafter that the other
modes run beside the target costs time that nobody weighs."""


class Bar(NamedTuple):
    """A claim, what was measured, and what must be reached."""

    title: str
    value: float
    least: float

    @property
    def holds(self) -> bool:
        """Whether it was reached."""
        return self.value >= self.least


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """All that can be judged by these rows; the worst row of each kind stands for it."""
    paced = [row for row in rows if row["clock"] == "simulated"]
    own = [row for row in rows if row["clock"] == "own"]
    found = [
        Bar("texts that equal plain decoding's", _share([row["same_text"] for row in rows]), 1.0),
        *_worst("measured against the cost model", paced, "against_model", 0.95),
        *_distance(paced),
        *_pool(paced),
        *_own(own),
    ]
    stalls = [row["stall_p50_ms"] for row in paced if row["mode"] == Mode.SPLIT]
    if stalls:
        found.append(Bar("0.3 ms by the median stall of a step", 0.3 / median(stalls), 1.0))
    return found


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def _worst(title: str, rows: Sequence[Row], name: str, least: float) -> Iterator[Bar]:
    judged = [row for row in rows if row[name] is not None]
    if judged:
        worst = min(judged, key=lambda row: row[name])
        yield Bar(f"{title}: {_place(worst)}", worst[name], least)


def _distance(rows: Sequence[Row]) -> Iterator[Bar]:
    by_distance = {
        (row["prompts"], row["batch"], row["round_trip"]): row["speed_up"]
        for row in rows
        if row["mode"] == Mode.PUSH
    }
    for (prompts, batch, round_trip), speed_up in by_distance.items():
        if round_trip == 0.5 and (near := by_distance.get((prompts, batch, 0.0))):
            yield Bar(f"push at half a step's distance: {prompts}, {batch}", speed_up / near, 0.95)


def _pool(rows: Sequence[Row]) -> Iterator[Bar]:
    local = {
        (row["prompts"], row["batch"]): row["speed_up"] for row in rows if row["mode"] == Mode.LOCAL
    }
    for row in rows:
        if row["mode"] != Mode.SPLIT or row["prompts"] != "MT-bench" or row["round_trip"]:
            continue
        yield Bar(
            f"accepted tokens that came in tables: {_place(row)}",
            row["accepted_from_pool"] / max(1, row["accepted"]),
            0.25,
        )
        without = local[row["prompts"], row["batch"]]
        yield Bar(f"with the pool against without: {_place(row)}", row["speed_up"] / without, 1.08)


def _own(rows: Sequence[Row]) -> Iterator[Bar]:
    rows = [row for row in rows if row["mode"] in _BUDGETED]
    yield from _worst("against plain decoding", rows, "median_speed_up", 0.97)
    for prompts, least in (("MT-bench", 1.4), ("repeating", 2.0)):
        single = [row for row in rows if row["prompts"] == prompts and row["batch"] == 1]
        if single:
            best = max(single, key=lambda row: row["speed_up"])
            yield Bar(f"the best against plain decoding: {_place(best)}", best["speed_up"], least)


def _place(row: Row) -> str:
    return f"{row['prompts']}, batch {row['batch']}, {row['mode']}, r = {row['round_trip']:g} T"
