"""What a draft replica tells of itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace


@dataclass(slots=True, kw_only=True)
class DraftServerStats:
    """Counters count since the start; whoever counts hands out snapshots.

    Attributes:
        num_pending: sessions with a question not yet answered.
        num_superseded: questions replaced by a newer round before a batch took them.
        num_bad_rows: left out of tables, for they answer nothing.
        num_frames_dropped: frames that found no room in a queue, both directions.
        num_dropped_by_reason: sessions dropped, by the protocol's reason.
        num_scored_by_role: rounds whose tables were scored, by whether the drafter at work or a
            candidate made them.
        num_confirmed_by_role: draft tokens of these that the text confirmed.
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
    num_dropped_by_reason: Counter[str] = field(default_factory=Counter)
    num_scored_by_role: Counter[str] = field(default_factory=Counter)
    num_confirmed_by_role: Counter[str] = field(default_factory=Counter)
    batch_time_ewma_s: float = 0.0

    def snapshot(self) -> DraftServerStats:
        """A copy that counts no further."""
        return replace(
            self,
            num_dropped_by_reason=self.num_dropped_by_reason.copy(),
            num_scored_by_role=self.num_scored_by_role.copy(),
            num_confirmed_by_role=self.num_confirmed_by_role.copy(),
        )
