"""What the KV tiers do now: the difference of two scrapes of the replicas' metrics. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.metrics_reader import MetricsSnapshot

_EVENTS = "paceline_kv_tier_pages_total"
_QUEUE = "paceline_kv_write_queue_pages"
_CACHED = "paceline_cached_tokens_total"
_PROMPT = "paceline_prompt_tokens_total"
_ALL_TIERS = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierActivity:
    """One tier, all replicas together; pages per second.

    Attributes:
        hit_rate: of the pages asked of it; None if there were none.
        served: pages given to other nodes.
        refused: pages it would not take.
        faults: corrupt pages and failed operations.
    """

    tier: str
    hit_rate: float | None
    hits: float
    misses: float
    puts: float
    moved: float
    served: float
    refused: float
    faults: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """All tiers.

    Attributes:
        seconds: the time it is about; 0 if it is all since the start, and then counts, not rates.
        from_replica: part of prompt tokens that were in their replica; None without prompts.
        from_tier: part of them that came from a tier.
        num_queued: pages waiting to be written.
        dropped: pages that were not written, as too many waited or no tier took them.
    """

    seconds: float
    from_replica: float | None
    from_tier: float | None
    num_queued: int
    dropped: float
    tiers: tuple[TierActivity, ...]


def activity(
    now: MetricsSnapshot, before: MetricsSnapshot | None = None, seconds: float = 0.0
) -> Activity:
    """What happened between two scrapes.

    Args:
        now: the later one.
        before: the earlier one; without it, all since the replicas' start.
        seconds: between them.
    """
    per = 1 / seconds if before is not None and seconds > 0 else 1.0

    def change(name: str, **labels: str) -> float:
        earlier = before.total(name, **labels) if before is not None else 0.0
        # A replica that has gone takes its counts with it.
        return max(0.0, now.total(name, **labels) - earlier)

    def tier(name: str) -> TierActivity:
        count = {event: change(_EVENTS, tier=name, event=event) for event in _TIER_EVENTS}
        return TierActivity(
            tier=name,
            hit_rate=_share(count["hit"], count["hit"] + count["miss"]),
            hits=count["hit"] * per,
            misses=count["miss"] * per,
            puts=count["put"] * per,
            moved=(count["promoted"] + count["demoted"]) * per,
            served=count["served"] * per,
            refused=count["refused"] * per,
            faults=(count["corrupt"] + count["error"]) * per,
        )

    prompt = change(_PROMPT)
    lost = [change(_EVENTS, tier=_ALL_TIERS, event=event) for event in ("dropped", "failed")]
    names = [name for name in now.by_label(_EVENTS, "tier") if name != _ALL_TIERS]
    return Activity(
        seconds=seconds if before is not None else 0.0,
        from_replica=_share(change(_CACHED, source="replica"), prompt),
        from_tier=_share(change(_CACHED, source="tier"), prompt),
        num_queued=int(now.total(_QUEUE)),
        dropped=sum(lost) * per,
        tiers=tuple(tier(name) for name in names),
    )


_TIER_EVENTS = (
    "hit",
    "miss",
    "put",
    "promoted",
    "demoted",
    "served",
    "refused",
    "corrupt",
    "error",
)


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
