"""``make bench-capacity``: clients a target holds at a time per token, by where drafts come from.

On a clock that jumps from event to event (``world``), so that no figure depends on this machine.
The largest number of clients is searched whose 95th percentile of time per token keeps the target;
with drafts beside the target, and in a pool one round away, each at its best draft length.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from itertools import product
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from tests.bench.capacity.pairs import PAIRS
from tests.bench.capacity.world import Place, World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.bench.capacity.pairs import Pair

_FOLDER = Path("build/reports")
_ROUNDING = 1e-9
_COLOURS = {Place.PLAIN: "#8b949e", Place.COLOCATED: "#2da44e", Place.OFFLOADED: "#1f6feb"}


class Held(NamedTuple):
    """The most clients, and the draft length with which they are held."""

    num_clients: int
    num_draft_tokens: int


def largest(is_held: Callable[[int], bool], most: int) -> int:
    """The largest number that is held, if none above one that is not is; 0 if not even one."""
    low, high = 0, 1
    while high <= most and is_held(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_held(middle) else (low, middle)
    return low


def held(pair: Pair, place: Place, slo: float, told: argparse.Namespace) -> Held:
    """Search the clients that this place of drafts holds.

    Args:
        slo: time per token, in steps of the target.
    """

    def clients_at(num_draft_tokens: int) -> int:
        def is_held(num_clients: int) -> bool:
            world = World(
                pair,
                place,
                num_draft_tokens,
                num_clients=num_clients,
                num_tokens=told.tokens,
                num_free_rows=told.free_rows,
                round_trip_s=told.round_trip_ms * 1e-3,
                target_s=slo * pair.target_s,
                seed=told.seed,
            )
            tpots_s = world.run(max(40, 2 * num_clients), told.first_steps)
            return quantiles(tpots_s, n=20)[-1] <= slo * pair.target_s * (1 + _ROUNDING)

        return largest(is_held, told.most)

    lengths = [0] if place is Place.PLAIN else told.draft_tokens
    return max(Held(clients_at(length), length) for length in lengths)


def measure(pair: Pair, slo: float, told: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    found = {place: held(pair, place, slo, told) for place in Place}
    beside, apart = found[Place.COLOCATED], found[Place.OFFLOADED]
    return {
        "pair": pair.name,
        "slo_steps": slo,
        "slo_ms": 1e3 * slo * pair.target_s,
        **{place.value: found[place].num_clients for place in Place},
        "k_colocated": beside.num_draft_tokens,
        "k_offloaded": apart.num_draft_tokens,
        "ratio": apart.num_clients / beside.num_clients if beside.num_clients else None,
        "closed_form": pair.closed_form(beside.num_draft_tokens),
        "per_gpu_plain": found[Place.PLAIN].num_clients / pair.num_gpus,
        "per_gpu_colocated": beside.num_clients / pair.num_gpus,
        "per_gpu_offloaded": apart.num_clients / (pair.num_gpus + 1),
    }


def main() -> int:
    """Measure, print, write ``build/reports/capacity.json`` and ``capacity.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slos", type=float, nargs="*", default=(0.6, 1.5), help="in target steps")
    parser.add_argument("--draft-tokens", type=int, nargs="*", default=(2, 4))
    parser.add_argument("--free-rows", type=int, default=16, help="that cost no time of their own")
    parser.add_argument("--round-trip-ms", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=32, help="of each text")
    parser.add_argument("--first-steps", type=int, default=100, help="that are not measured")
    parser.add_argument("--most", type=int, default=256, help="clients that are tried")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="the first so many")
    told = parser.parse_args()
    logging.disable(logging.INFO)
    rows = []
    for pair, slo in product(PAIRS[: told.pairs], told.slos):
        row = measure(pair, slo, told)
        rows.append(row)
        sys.stderr.write(
            f"{pair.name}, {slo:g} T: plain {row['plain']}, colocated {row['colocated']}, "
            f"offloaded {row['offloaded']}\n"
        )
    _FOLDER.mkdir(parents=True, exist_ok=True)
    report = {
        "options": vars(told),
        "pairs": [pair._asdict() for pair in PAIRS[: told.pairs]],
        "rows": rows,
        "bars": {},
    }
    (_FOLDER / "capacity.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(rows, _FOLDER / "capacity.png")
    show(rows)
    return 0


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print everything, and where splitting loses."""
    table = Table(title="clients held; ratio: offloaded / colocated; closed form: 1 + k d / T")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*map(_text, row.values()))
    console = Console(width=200)
    console.print(table)
    for row in rows:
        others = max(row["per_gpu_plain"], row["per_gpu_colocated"])
        if row["per_gpu_offloaded"] < others:
            console.print(
                f"a pool loses by GPU: {row['pair']}, {row['slo_steps']:g} T "
                f"({row['per_gpu_offloaded']:.2f} against {others:.2f} clients)",
                markup=False,
            )


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Clients by pair, a panel for each target."""
    slos = list(dict.fromkeys(row["slo_steps"] for row in rows))
    figure, grid = plt.subplots(1, len(slos), figsize=(6 * len(slos), 4.5), squeeze=False)
    for axes, slo in zip(grid[0], slos, strict=True):
        own = [row for row in rows if row["slo_steps"] == slo]
        for number, place in enumerate(Place):
            places = [index + 0.27 * (number - 1) for index in range(len(own))]
            axes.bar(
                places,
                [row[place.value] for row in own],
                width=0.25,
                color=_COLOURS[place],
                label=place.value,
            )
        axes.set_xticks(range(len(own)), [row["pair"] for row in own], rotation=30, ha="right")
        axes.set_title(f"time per token: {slo:g} target steps", fontsize=9)
        axes.set_ylabel("clients held")
    grid[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
