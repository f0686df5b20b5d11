"""What speculation did, in numbers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

_ROUND_TRIP_SAMPLES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculatorStats:
    """A snapshot; counters count since the start.

    Attributes:
        num_rounds: verified rounds, plain ones included.
        num_table_hits: rounds whose draft came from a row of the pool.
        num_table_misses: rounds for which the pool was asked and no row fitted.
        num_late_tables: tables that arrived after the next round had begun.
        num_pool_draft_tokens: verified draft tokens guessed by the pool.
        num_local_draft_tokens: verified draft tokens guessed by the local drafter.
        num_head_draft_tokens: verified draft tokens guessed by the head beside the target.
        num_withheld_draft_tokens: draft tokens at hand that were not verified, because the step
            would have taken longer than they promised to save, or than somebody's target allows.
        num_yielded_draft_tokens: those of them that would have paid and were left out for a target.
        num_targets_met: targets for the time per output token, counted in every step that the
            budget chose, that the step was expected to meet.
        num_targets_missed: those that it was expected to miss, as every other step would have.
        step_time_s: what steps took.
        plain_time_s: what steps without drafts would have taken for as many tokens.
        num_frames_dropped: frames to the pool that found no room in a queue.
        num_resyncs: gaps a drafter reported, repaired by sending again.
        num_sessions_dropped: sessions a drafter let go of.
        num_malformed: messages of drafters that broke the protocol.
        num_links_lost: streams that ended or were refused.
        num_local_failures: failures of the local drafter and the head.
        round_trip_p50_s: median time from a commit to its table; 0 before the first.
        num_pool_pending: sessions that wait for a table, as a draft replica reported last.
        pool_batch_time_s: what its drafter takes for a batch, likewise.
        stall_p50_s: median of what drafts added to a step outside forward and choice of tokens,
            where an engine tells; 0 elsewhere.
    """

    num_rounds: int = 0
    num_table_hits: int = 0
    num_table_misses: int = 0
    num_tables: int = 0
    num_late_tables: int = 0
    num_pool_draft_tokens: int = 0
    num_pool_accepted_tokens: int = 0
    num_local_draft_tokens: int = 0
    num_local_accepted_tokens: int = 0
    num_head_draft_tokens: int = 0
    num_head_accepted_tokens: int = 0
    num_withheld_draft_tokens: int = 0
    num_yielded_draft_tokens: int = 0
    num_targets_met: int = 0
    num_targets_missed: int = 0
    step_time_s: float = 0.0
    plain_time_s: float = 0.0
    num_frames_dropped: int = 0
    num_resyncs: int = 0
    num_sessions_dropped: int = 0
    num_malformed: int = 0
    num_links_lost: int = 0
    num_local_failures: int = 0
    num_links_up: int = 0
    num_pool_sessions: int = 0
    round_trip_p50_s: float = 0.0
    num_pool_pending: int = 0
    pool_batch_time_s: float = 0.0
    stall_p50_s: float = 0.0


@dataclass(slots=True)
class PoolCounters:
    """What the links count; changed under the pool client's lock."""

    num_tables: int = 0
    num_late_tables: int = 0
    num_frames_dropped: int = 0
    num_resyncs: int = 0
    num_sessions_dropped: int = 0
    num_malformed: int = 0
    num_links_lost: int = 0
    num_pool_pending: int = 0
    pool_batch_time_s: float = 0.0
    _round_trips_s: deque[float] = field(default_factory=lambda: deque(maxlen=_ROUND_TRIP_SAMPLES))

    def on_table(self, round_trip_s: float, *, is_late: bool) -> None:
        """Count a table that was of use."""
        self.num_tables += 1
        self.num_late_tables += is_late
        self._round_trips_s.append(round_trip_s)

    @property
    def round_trip_p50_s(self) -> float:
        """The median of the last round trips; 0 before the first."""
        ordered = sorted(self._round_trips_s)
        return ordered[len(ordered) // 2] if ordered else 0.0
