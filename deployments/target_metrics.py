"""A target replica's snapshots as metrics; called every few seconds, never per token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments import metrics as names
from deployments.metrics import LabelledFeeds, TotalFeed, new_counter, new_gauge

if TYPE_CHECKING:
    from deployments.engine.speculation.speculator_stats import SpeculatorStats
    from deployments.engine.types import EngineStats
    from kv_store.page_store import PageStoreStats


class TargetMetrics:
    """What a target replica reports."""

    def __init__(self) -> None:
        self._draft_tokens = LabelledFeeds(names.DRAFT_TOKENS)
        self._withheld = LabelledFeeds(names.WITHHELD_TOKENS)
        self._tpot_targets = LabelledFeeds(names.TPOT_TARGETS)
        self._accepted = LabelledFeeds(names.ACCEPTED_TOKENS)
        self._spec_steps = TotalFeed(new_counter(names.SPEC_STEPS))
        self._spec_step_time = LabelledFeeds(names.SPEC_STEP_TIME)
        self._lookups = LabelledFeeds(names.TABLE_LOOKUPS)
        self._preemptions = TotalFeed(new_counter(names.PREEMPTIONS))
        self._recomputed = TotalFeed(new_counter(names.RECOMPUTED))
        self._steps = TotalFeed(new_counter(names.STEPS))
        self._running = new_gauge(names.RUNNING)
        self._waiting = new_gauge(names.WAITING)
        self._step_time = new_gauge(names.STEP_TIME)
        self._pages = new_gauge(names.PAGES)
        self._queue = new_gauge(names.STORE_QUEUE)
        self._loads_refused = TotalFeed(new_counter(names.LOADS_REFUSED))
        self._tier_pages = LabelledFeeds(names.TIER_PAGES)
        self._single_flights = LabelledFeeds(names.SINGLE_FLIGHTS)
        self._sessions = new_gauge(names.DRAFT_SESSIONS)
        self._links = new_gauge(names.DRAFT_LINKS)
        self._linked_sessions = new_gauge(names.LINKED_SESSIONS)
        self._round_trip = new_gauge(names.ROUND_TRIP)
        self._stall = new_gauge(names.SPECULATION_STALL)
        self._tables = LabelledFeeds(names.OUTCOME_TABLES)
        self._events = LabelledFeeds(names.SPECULATOR_EVENTS)

    def engine(self, stats: EngineStats) -> None:
        """Report an engine's snapshot."""
        spec = stats.speculation
        num_elsewhere = spec.num_accepted_pool_tokens + spec.num_accepted_head_tokens
        num_local = spec.num_accepted_draft_tokens - num_elsewhere
        self._accepted.update("pool", total=spec.num_accepted_pool_tokens)
        self._accepted.update("head", total=spec.num_accepted_head_tokens)
        self._accepted.update("local", total=num_local)
        self._spec_steps.update(spec.num_spec_steps)
        self._lookups.update("hit", total=spec.num_table_hits)
        self._lookups.update("miss", total=spec.num_table_misses)
        self._preemptions.update(stats.num_preemptions)
        self._recomputed.update(stats.num_recomputed_tokens)
        self._steps.update(stats.num_steps)
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._step_time.set(stats.step_time_ewma_s)
        self._pages.set(stats.num_free_pages, tags={"state": "free"})
        self._pages.set(stats.num_total_pages - stats.num_free_pages, tags={"state": "used"})

    def speculator(self, stats: SpeculatorStats) -> None:
        """Report the snapshot of the way to the drafters.

        Hits, misses and accepted tokens are the engine's to report. What a draft replica last said
        of its own load is in ``draft_metrics``, from all of them and first hand.
        """
        self._draft_tokens.update("pool", total=stats.num_pool_draft_tokens)
        self._draft_tokens.update("local", total=stats.num_local_draft_tokens)
        self._draft_tokens.update("head", total=stats.num_head_draft_tokens)
        num_yielded = stats.num_yielded_draft_tokens
        self._withheld.update("cost", total=stats.num_withheld_draft_tokens - num_yielded)
        self._withheld.update("target", total=num_yielded)
        self._tpot_targets.update("met", total=stats.num_targets_met)
        self._tpot_targets.update("missed", total=stats.num_targets_missed)
        self._spec_step_time.update("taken", total=stats.step_time_s)
        self._spec_step_time.update("plain", total=stats.plain_time_s)
        self._tables.update("in_time", total=stats.num_tables - stats.num_late_tables)
        self._tables.update("late", total=stats.num_late_tables)
        self._events.update("link_lost", total=stats.num_links_lost)
        self._events.update("frame_dropped", total=stats.num_frames_dropped)
        self._events.update("malformed", total=stats.num_malformed)
        self._events.update("resync", total=stats.num_resyncs)
        self._events.update("session_dropped", total=stats.num_sessions_dropped)
        self._events.update("local_drafter_failed", total=stats.num_local_failures)
        self._links.set(stats.num_links_up)
        self._linked_sessions.set(stats.num_pool_sessions)
        self._round_trip.set(stats.round_trip_p50_s)
        self._stall.set(stats.stall_p50_s)

    def page_store(self, stats: PageStoreStats) -> None:
        """Report the KV tier's snapshot."""
        self._queue.set(stats.num_queued)
        self._loads_refused.update(stats.num_loads_refused)
        self._single_flights.update("joined", total=stats.num_flights_joined)
        self._single_flights.update("in_vain", total=stats.num_flights_in_vain)
        self._tier_pages.update("all", "dropped", total=stats.num_dropped)
        self._tier_pages.update("all", "failed", total=stats.num_failed)
        self._tier_pages.update("all", "move_dropped", total=stats.num_moves_dropped)
        for name, tier in stats.tiers.items():
            self._tier_pages.update(name, "hit", total=tier.num_hits)
            self._tier_pages.update(name, "miss", total=tier.num_misses)
            self._tier_pages.update(name, "put", total=tier.num_puts)
            self._tier_pages.update(name, "refused", total=tier.num_refused)
            self._tier_pages.update(name, "served", total=tier.num_served)
            self._tier_pages.update(name, "promoted", total=tier.num_promoted)
            self._tier_pages.update(name, "demoted", total=tier.num_demoted)
            self._tier_pages.update(name, "corrupt", total=tier.num_corrupt)
            self._tier_pages.update(name, "error", total=tier.num_errors)

    def draft_sessions(self, num_attached: int) -> None:
        """Report how many sequences hold a draft replica."""
        self._sessions.set(num_attached)
