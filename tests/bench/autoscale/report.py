"""Both runs side by side, and whether the bars hold."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_GOODPUT, MAX_REPLICA_SECONDS = 0.9, 0.7
POOLS = ("target", "draft")


def compare(autoscaled: dict[str, Any], static: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The report of the whole benchmark.

    Args:
        autoscaled: of the cluster that scales.
        static: of the other one.
        seconds: of the load; replicas are counted for as long.
    """
    spent = {
        name: {pool: replica_seconds(run["replicas"], pool, seconds) for pool in POOLS}
        for name, run in (("autoscaled", autoscaled), ("static", static))
    }
    goodput = autoscaled["all"]["num_good"] / max(1, static["all"]["num_good"])
    share = sum(spent["autoscaled"].values()) / max(1e-9, sum(spent["static"].values()))
    update = autoscaled["is_updated"]
    bars = {
        "goodput_share": _bar(goodput, MIN_GOODPUT, holds=goodput >= MIN_GOODPUT),
        "replica_seconds_share": _bar(
            share, MAX_REPLICA_SECONDS, holds=share <= MAX_REPLICA_SECONDS
        ),
        "lost_requests": _bar(len(autoscaled["lost"]), 0, holds=not autoscaled["lost"]),
        "rolling_update": _bar(update, "ends", holds=isinstance(update, dict)),
    }
    rest = autoscaled["drafts_rest"]
    bars["drafts_to_zero_and_back"] = _bar(rest, "both", holds=isinstance(rest, dict))
    # An update starts replicas before it stops any: that is no answer to the load.
    until_s = update["began_s"] if isinstance(update, dict) else seconds
    samples = [sample for sample in autoscaled["replicas"] if sample["at_s"] < until_s]
    for pool in POOLS:
        grew, shrank = moves(samples, pool)
        bars[f"{pool}_pool_moves"] = _bar(
            {"up": grew, "down": shrank}, "both", holds=bool(grew and shrank)
        )
        told = explained(autoscaled["explained"], pool)
        bars[f"{pool}_pool_explained"] = _bar(
            told, "each way in the log and in the metric", holds=all(told.values())
        )
    return {
        "bars": bars,
        "replica_seconds": spent,
        "decisions": autoscaled["decisions"],
        "autoscaled": autoscaled,
        "static": static,
    }


def replica_seconds(samples: Sequence[dict[str, Any]], pool: str, seconds: float) -> float:
    """Replicas over time, each sample counted until the next."""
    total = 0.0
    ends = [*samples[1:], {"at_s": seconds}]
    for sample, following in zip(samples, ends, strict=True):
        lasted = min(seconds, following["at_s"]) - min(seconds, sample["at_s"])
        total += max(0.0, lasted) * sample["replicas"].get(pool, 0)
    return total


def moves(samples: Sequence[dict[str, Any]], pool: str) -> tuple[int, int]:
    """How often a pool grew and shrank between two samples."""
    sizes = [sample["replicas"].get(pool, 0) for sample in samples]
    steps = [after - before for before, after in pairwise(sizes)]
    return sum(step > 0 for step in steps), sum(step < 0 for step in steps)


def explained(told: dict[str, Any], pool: str) -> dict[str, int]:
    """How often the log and the metric say that a pool grows or shrinks.

    Args:
        told: ``log``, the controller's lines, and ``metric``, decisions by pool and direction.
        pool: that is asked about.
    """
    lines = [line for line in told["log"] if f"autoscaling: {pool}: " in line]
    metric = told["metric"].get(pool, {})
    return {
        "grow in the log": sum(f"{pool}: grow " in line for line in lines),
        "shrink in the log": sum(f"{pool}: shrink " in line for line in lines),
        "up in the metric": int(metric.get("up", 0)),
        "down in the metric": int(metric.get("down", 0)),
    }


def table(report: dict[str, Any]) -> str:
    """For a terminal."""
    rows = [("", "autoscaled", "static")]
    runs = report["autoscaled"], report["static"]
    for label, key in (
        ("requests", "num_requests"),
        ("good (TTFT within the SLO)", "num_good"),
        ("rejected", "num_rejected"),
        ("failed, rejected ones included", "num_failed"),
    ):
        rows.append((label, *(str(run["all"][key]) for run in runs)))
    for cut in ("p50", "p99"):
        waits = (run["all"]["ttft_s"]["percentiles"].get(cut) for run in runs)
        rows.append((f"TTFT {cut}, s", *("-" if each is None else f"{each:.2f}" for each in waits)))
    for pool in POOLS:
        spent = (report["replica_seconds"][name][pool] for name in ("autoscaled", "static"))
        rows.append((f"{pool} replica-seconds", *(f"{each:.0f}" for each in spent)))
    lines = [f"{label:34}{one:>12}{other:>12}" for label, one, other in rows]
    lines += [
        f"{name:34}{_shown(bar['value']):>24}  bar {bar['bar']}  "
        f"{'holds' if bar['holds'] else 'MISSED'}"
        for name, bar in report["bars"].items()
    ]
    return "\n".join(lines)


def _bar(value: Any, bar: Any, *, holds: bool) -> dict[str, Any]:
    return {"value": value, "bar": bar, "holds": holds}


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
