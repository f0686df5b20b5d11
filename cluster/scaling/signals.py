"""What replicas said, as the policy reads it."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from deployments import scaling_stats as stats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Reports = "Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]"
"""By name of a figure and replica: (time, value), oldest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSignals:
    """What is known of any pool.

    Attributes:
        num_target: replicas it shall have.
        num_running: that run.
        num_reporting: of those, that have said something of late.
        num_requests: in flight and waiting, before the replicas and in them.
    """

    name: str
    num_target: int
    num_running: int
    num_reporting: int
    num_requests: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSignals(PoolSignals):
    """What is known of the target pool.

    Attributes:
        kv_share: of its KV pages, that running sequences own; mean of the replicas.
        num_backlog_tokens: prompt tokens still to compute, of the whole pool.
        prefill_tokens_per_s: that one replica computes; 0 while unknown.
        ttft_p90_s: of the last requests at the replicas; None without any.
        draft_gain: relative gain in tokens per second by drafts of the pool; None while unknown.
    """

    kv_share: float = 0.0
    num_backlog_tokens: float = 0.0
    prefill_tokens_per_s: float = 0.0
    ttft_p90_s: float | None = None
    draft_gain: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSignals(PoolSignals):
    """What is known of the draft pool.

    Attributes:
        num_rows_per_s: rows of outcome tables made, of the whole pool.
        num_busy: replicas' worth of time spent drafting.
        late_share: of the questions, that a newer round replaced before they were answered.
    """

    num_rows_per_s: float = 0.0
    num_busy: float = 0.0
    late_share: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolState:
    """A pool as Serve knows it.

    Attributes:
        num_queued: requests that wait for a replica with room.
        reports: what running replicas said, see ``Reports``.
    """

    name: str
    num_target: int
    num_running: int
    num_requests: float
    num_queued: float
    reports: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]


class _Fresh:
    """The reports of replicas that have said something of late."""

    def __init__(self, state: PoolState, now_s: float, stale_after_s: float) -> None:
        self._series = {
            name: {
                replica: points
                for replica, points in by_replica.items()
                if points and now_s - points[-1][0] <= stale_after_s
            }
            for name, by_replica in state.reports.items()
        }
        self._num_running = state.num_running

    @property
    def num_reporting(self) -> int:
        return len({replica for series in self._series.values() for replica in series})

    def means(self, name: str) -> dict[str, float]:
        """Over time, of each replica."""
        series = self._series.get(name, {})
        return {replica: fmean(value for _, value in points) for replica, points in series.items()}

    def mean(self, name: str) -> float:
        values = self.means(name).values()
        return fmean(values) if values else 0.0

    def total(self, name: str) -> float:
        """Of the whole pool; replicas that said nothing are taken for average ones."""
        return self.mean(name) * self._num_running

    def weighted(self, name: str, weight: str) -> float | None:
        """A figure weighted by another one of its replica; None without any weight."""
        values, weights = self.means(name), self.means(weight)
        total = sum(weights.get(replica, 0.0) for replica in values)
        if total <= 0:
            return None
        return sum(value * weights.get(replica, 0.0) for replica, value in values.items()) / total


def target_signals(state: PoolState, now_s: float, stale_after_s: float) -> TargetSignals:
    """Of a target pool."""
    fresh = _Fresh(state, now_s, stale_after_s)
    speed = fresh.weighted(stats.PREFILL_SPEED, stats.PREFILL_SPEED_KNOWN)
    return TargetSignals(
        name=state.name,
        num_target=state.num_target,
        num_running=state.num_running,
        num_reporting=fresh.num_reporting,
        num_requests=fresh.total(stats.OPEN) + state.num_queued,
        kv_share=fresh.mean(stats.KV_SHARE),
        num_backlog_tokens=fresh.total(stats.BACKLOG_TOKENS),
        prefill_tokens_per_s=speed or 0.0,
        ttft_p90_s=fresh.weighted(stats.TTFT_P90, stats.NUM_TTFTS),
        draft_gain=fresh.weighted(stats.DRAFT_GAIN, stats.NUM_DRAFTED_STEPS),
    )


def draft_signals(state: PoolState, now_s: float, stale_after_s: float) -> DraftSignals:
    """Of a draft pool; a request is a session that holds a replica or waits for one."""
    fresh = _Fresh(state, now_s, stale_after_s)
    return DraftSignals(
        name=state.name,
        num_target=state.num_target,
        num_running=state.num_running,
        num_reporting=fresh.num_reporting,
        num_requests=state.num_requests,
        num_rows_per_s=fresh.total(stats.ROWS_PER_S),
        num_busy=fresh.total(stats.BUSY_SHARE),
        late_share=fresh.mean(stats.LATE_SHARE),
    )


def pool_signals(state: PoolState) -> PoolSignals:
    """Of a pool whose replicas report nothing: Serve counts their requests."""
    return PoolSignals(
        name=state.name,
        num_target=state.num_target,
        num_running=state.num_running,
        num_reporting=state.num_running,
        num_requests=state.num_requests,
    )
