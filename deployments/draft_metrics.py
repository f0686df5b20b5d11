"""A draft replica's snapshot as metrics; called every few seconds, never per table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments import metrics as names
from deployments.metrics import LabelledFeeds, TotalFeed, new_counter, new_gauge

if TYPE_CHECKING:
    from deployments.engine.speculation.canary import Outcome
    from deployments.engine.speculation.draft_stats import DraftServerStats


class DraftMetrics:
    """What a draft replica reports."""

    def __init__(self) -> None:
        self._streams = new_gauge(names.DRAFT_STREAMS)
        self._sessions = new_gauge(names.DRAFT_SERVER_SESSIONS)
        self._pending = new_gauge(names.DRAFT_PENDING)
        self._batch_time = new_gauge(names.DRAFT_BATCH_TIME)
        self._batches = TotalFeed(new_counter(names.DRAFT_BATCHES))
        self._tables = TotalFeed(new_counter(names.DRAFT_TABLES))
        self._rows = TotalFeed(new_counter(names.DRAFT_ROWS))
        self._events = LabelledFeeds(names.DRAFT_SERVER_EVENTS)
        self._drops = LabelledFeeds(names.DRAFT_DROPS)
        self._scored = LabelledFeeds(names.DRAFT_SCORED_ROUNDS)
        self._confirmed = LabelledFeeds(names.DRAFT_CONFIRMED)
        self._trial = new_gauge(names.DRAFT_TRIAL)
        self._trials = new_counter(names.DRAFT_TRIALS)

    def server(self, stats: DraftServerStats) -> None:
        """Report the server's snapshot."""
        self._streams.set(stats.num_streams)
        self._sessions.set(stats.num_sessions)
        self._pending.set(stats.num_pending)
        self._batch_time.set(stats.batch_time_ewma_s)
        self._batches.update(stats.num_batches)
        self._tables.update(stats.num_tables)
        self._rows.update(stats.num_rows)
        self._events.update("superseded", total=stats.num_superseded)
        self._events.update("stale_commit", total=stats.num_stale_commits)
        self._events.update("resync", total=stats.num_resyncs)
        self._events.update("drafter_failed", total=stats.num_drafter_failures)
        self._events.update("bad_row", total=stats.num_bad_rows)
        self._events.update("frame_dropped", total=stats.num_frames_dropped)
        for reason, total in stats.num_dropped_by_reason.items():
            self._drops.update(reason, total=total)
        for role, total in stats.num_scored_by_role.items():
            self._scored.update(role, total=total)
        for role, total in stats.num_confirmed_by_role.items():
            self._confirmed.update(role, total=total)

    def trial(self, *, is_running: bool) -> None:
        """Report whether a candidate is on trial."""
        self._trial.set(is_running)

    def decided(self, outcome: Outcome) -> None:
        """Count a candidate that was judged here."""
        self._trials.inc(tags={"outcome": outcome})
