"""A target replica's snapshots as metrics; called every few seconds, never per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments import metrics as names
from deployments.metrics import new_counter, new_gauge

if TYPE_CHECKING:
    from ray.serve import metrics

    from deployments.engine.types import EngineStats
    from kv_store.page_store import PageStoreStats


class _Delta:
    """Feeds a counter from a total that only grows."""

    def __init__(self, counter: metrics.Counter, tags: dict[str, str] | None = None) -> None:
        self._counter = counter
        self._tags = tags
        self._seen = 0

    def update(self, total: int) -> None:
        if total > self._seen:
            self._counter.inc(total - self._seen, tags=self._tags)
            self._seen = total


class TargetMetrics:
    """What a target replica reports."""

    def __init__(self) -> None:
        accepted = new_counter(names.ACCEPTED_TOKENS)
        lookups = new_counter(names.TABLE_LOOKUPS)
        self._draft_tokens = _Delta(new_counter(names.DRAFT_TOKENS))
        self._accepted_pool = _Delta(accepted, {"origin": "pool"})
        self._accepted_local = _Delta(accepted, {"origin": "local"})
        self._spec_steps = _Delta(new_counter(names.SPEC_STEPS))
        self._hits = _Delta(lookups, {"result": "hit"})
        self._misses = _Delta(lookups, {"result": "miss"})
        self._preemptions = _Delta(new_counter(names.PREEMPTIONS))
        self._steps = _Delta(new_counter(names.STEPS))
        self._running = new_gauge(names.RUNNING)
        self._waiting = new_gauge(names.WAITING)
        self._step_time = new_gauge(names.STEP_TIME)
        self._pages = new_gauge(names.PAGES)
        self._queue = new_gauge(names.STORE_QUEUE)
        self._sessions = new_gauge(names.DRAFT_SESSIONS)
        self._tier_pages = new_counter(names.TIER_PAGES)
        self._tiers: dict[tuple[str, str], _Delta] = {}

    def engine(self, stats: EngineStats) -> None:
        """Report an engine's snapshot."""
        spec = stats.speculation
        self._draft_tokens.update(spec.num_draft_tokens)
        self._accepted_pool.update(spec.num_accepted_pool_tokens)
        self._accepted_local.update(spec.num_accepted_draft_tokens - spec.num_accepted_pool_tokens)
        self._spec_steps.update(spec.num_spec_steps)
        self._hits.update(spec.num_table_hits)
        self._misses.update(spec.num_table_misses)
        self._preemptions.update(stats.num_preemptions)
        self._steps.update(stats.num_steps)
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._step_time.set(stats.step_time_ewma_s)
        self._pages.set(stats.num_free_pages, tags={"state": "free"})
        self._pages.set(stats.num_total_pages - stats.num_free_pages, tags={"state": "used"})

    def page_store(self, stats: PageStoreStats) -> None:
        """Report the KV tier's snapshot."""
        self._queue.set(stats.num_queued)
        self._tier("all", "dropped", stats.num_dropped)
        for name, tier in stats.tiers.items():
            self._tier(name, "hit", tier.num_hits)
            self._tier(name, "miss", tier.num_misses)
            self._tier(name, "put", tier.num_puts)
            self._tier(name, "corrupt", tier.num_corrupt)
            self._tier(name, "error", tier.num_errors)

    def draft_sessions(self, num_attached: int) -> None:
        """Report how many sequences hold a draft replica."""
        self._sessions.set(num_attached)

    def _tier(self, tier: str, event: str, total: int) -> None:
        key = (tier, event)
        if key not in self._tiers:
            self._tiers[key] = _Delta(self._tier_pages, {"tier": tier, "event": event})
        self._tiers[key].update(total)
