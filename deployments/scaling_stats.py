"""What replicas tell the autoscaling policy of themselves, in figures of the last moments.

Ray Serve asks every few seconds (``record_autoscaling_stats``), only where a pool has autoscaling.
Figures over time are differences to the last question.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.speculation.draft_stats import DraftServerStats
    from deployments.engine.speculation.speculator_stats import SpeculatorStats
    from deployments.engine.types import EngineStats

OPEN = "open_requests"
"""Sequences running and waiting in the engine."""
KV_SHARE = "kv_share"
BACKLOG_TOKENS = "backlog_tokens"
PREFILL_SPEED = "prefill_tokens_per_s"
PREFILL_SPEED_KNOWN = "prefill_speed_known"
"""1 once ``PREFILL_SPEED`` was measured, else 0."""
TTFT_P90 = "ttft_p90_s"
NUM_TTFTS = "num_ttfts"
"""Requests that ``TTFT_P90`` is of."""
DRAFT_GAIN = "draft_gain"
NUM_DRAFTED_STEPS = "num_drafted_steps"
"""Steps with accepted or refused drafts of the pool that ``DRAFT_GAIN`` is of."""
ROWS_PER_S = "rows_per_s"
BUSY_SHARE = "busy_share"
LATE_SHARE = "late_share"

TTFT_WINDOW_S = 15.0
"""How far back ``TTFT_P90`` looks."""
_MAX_TTFTS = 512
_P90 = 0.9
_SPEED_WEIGHT = 0.3
_MIN_INTERVAL_S = 0.05


class TargetScalingStats:
    """Figures of one target replica. Used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ttfts: deque[tuple[float, float]] = deque(maxlen=_MAX_TTFTS)
        self._asked_at = clock()
        self._num_computed = 0
        self._had_backlog = False
        self._prefill_speed = 0.0
        self._spec: SpeculatorStats | None = None

    def first_token(self, waited_s: float) -> None:
        """A request got its first token, so long after it had reached the replica."""
        self._ttfts.append((self._clock(), waited_s))

    def figures(self, stats: EngineStats, spec: SpeculatorStats | None) -> dict[str, float]:
        """Figures since the last call."""
        now = self._clock()
        elapsed = max(_MIN_INTERVAL_S, now - self._asked_at)
        self._asked_at = now
        self._learn_speed(stats, elapsed)
        figures = {
            OPEN: float(stats.num_running + stats.num_waiting),
            KV_SHARE: 1 - stats.num_free_pages / stats.num_total_pages
            if stats.num_total_pages
            else 0.0,
            BACKLOG_TOKENS: float(stats.num_backlog_tokens),
            PREFILL_SPEED: self._prefill_speed,
            PREFILL_SPEED_KNOWN: float(self._prefill_speed > 0),
        }
        return figures | self._waits(now) | self._gain(spec)

    def _learn_speed(self, stats: EngineStats, elapsed: float) -> None:
        """What was computed while there was always more to compute is what can be."""
        # Prompts count once they are admitted; what of them is left, is in the backlog.
        num_computed = stats.num_prompt_tokens - stats.num_local_cached_tokens
        num_computed -= stats.num_tier_cached_tokens
        num_new = num_computed - self._num_computed
        self._num_computed = num_computed
        had_backlog, self._had_backlog = self._had_backlog, stats.num_backlog_tokens > 0
        if not (had_backlog and self._had_backlog and num_new > 0):
            return
        speed = num_new / elapsed
        weight = _SPEED_WEIGHT if self._prefill_speed else 1.0
        self._prefill_speed += weight * (speed - self._prefill_speed)

    def _waits(self, now: float) -> dict[str, float]:
        while self._ttfts and now - self._ttfts[0][0] > TTFT_WINDOW_S:
            self._ttfts.popleft()
        waits = sorted(waited for _, waited in self._ttfts)
        p90 = waits[round(_P90 * (len(waits) - 1))] if waits else 0.0
        return {TTFT_P90: p90, NUM_TTFTS: float(len(waits))}

    def _gain(self, spec: SpeculatorStats | None) -> dict[str, float]:
        old, self._spec = self._spec, spec
        if spec is None or old is None:
            return {DRAFT_GAIN: 0.0, NUM_DRAFTED_STEPS: 0.0}
        num_pool = spec.num_pool_accepted_tokens - old.num_pool_accepted_tokens
        num_local = spec.num_local_accepted_tokens - old.num_local_accepted_tokens
        num_head = spec.num_head_accepted_tokens - old.num_head_accepted_tokens
        taken_s = spec.step_time_s - old.step_time_s
        plain_s = spec.plain_time_s - old.plain_time_s
        num_steps = spec.num_table_hits - old.num_table_hits
        num_steps += spec.num_table_misses - old.num_table_misses
        if taken_s <= 0:
            return {DRAFT_GAIN: 0.0, NUM_DRAFTED_STEPS: 0.0}
        share = num_pool / max(1, num_pool + num_local + num_head)
        return {
            DRAFT_GAIN: (plain_s / taken_s - 1) * share,
            NUM_DRAFTED_STEPS: float(num_steps),
        }


class DraftScalingStats:
    """Figures of one draft replica. Used from one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_at = clock()
        self._old: DraftServerStats | None = None

    def figures(self, stats: DraftServerStats) -> dict[str, float]:
        """Figures since the last call."""
        now = self._clock()
        elapsed = max(_MIN_INTERVAL_S, now - self._asked_at)
        old, self._old, self._asked_at = self._old, stats, now
        if old is None:
            return {ROWS_PER_S: 0.0, BUSY_SHARE: 0.0, LATE_SHARE: 0.0}
        num_batches = stats.num_batches - old.num_batches
        num_tables = stats.num_tables - old.num_tables
        num_superseded = stats.num_superseded - old.num_superseded
        return {
            ROWS_PER_S: (stats.num_rows - old.num_rows) / elapsed,
            BUSY_SHARE: min(1.0, num_batches * stats.batch_time_ewma_s / elapsed),
            LATE_SHARE: num_superseded / max(1, num_superseded + num_tables),
        }
