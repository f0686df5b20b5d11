"""What a draft replica tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftServerStats:
    """A snapshot; counters count since the start.

    Attributes:
        num_pending: sessions with a question not yet answered.
        num_superseded: questions replaced by a newer round before a batch took them.
        num_bad_rows: left out of tables, for they answer nothing.
        num_dropped_by_reason: sessions dropped, by the protocol's reason.
        num_frames_dropped: frames that found no room in a queue, both directions.
        num_scored_by_role: of the drafter at work and of candidates: rounds whose tables were
            scored, and draft tokens of these that the text confirmed.
        batch_time_ewma_s: of one drafter call.
    """

    num_streams: int = 0
    num_sessions: int = 0
    num_pending: int = 0
    num_tables: int = 0
    num_rows: int = 0
    num_batches: int = 0
    num_superseded: int = 0
    num_stale_commits: int = 0
    num_resyncs: int = 0
    num_drafter_failures: int = 0
    num_bad_rows: int = 0
    num_frames_dropped: int = 0
    num_dropped_by_reason: tuple[tuple[str, int], ...] = ()
    num_scored_by_role: tuple[tuple[str, int, int], ...] = ()
    batch_time_ewma_s: float = 0.0
