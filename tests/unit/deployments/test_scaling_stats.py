"""What replicas tell the autoscaling policy."""

from __future__ import annotations

import pytest

from deployments import scaling_stats as stats
from deployments.engine.speculation.draft_stats import DraftServerStats
from deployments.engine.speculation.gain import GainMeter
from deployments.engine.speculation.speculator_stats import SpeculatorStats
from deployments.engine.speculation.step_times import StepTimes
from deployments.engine.types import EngineStats
from deployments.scaling_stats import DraftScalingStats, TargetScalingStats


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def engine(**changes) -> EngineStats:
    return EngineStats(num_total_pages=100, **({"num_free_pages": 100} | changes))


def test_a_target_tells_what_is_open_and_how_full_it_is(clock):
    target = TargetScalingStats(clock)
    figures = target.figures(
        engine(num_running=3, num_waiting=2, num_free_pages=25, num_backlog_tokens=70), None
    )
    assert figures[stats.OPEN] == 5
    assert figures[stats.KV_SHARE] == 0.75
    assert figures[stats.BACKLOG_TOKENS] == 70
    assert all(isinstance(value, float) for value in figures.values())


def test_waits_are_those_of_the_last_moments(clock):
    target = TargetScalingStats(clock)
    for waited_s in range(11):
        target.first_token(float(waited_s))
    figures = target.figures(engine(), None)
    assert (figures[stats.TTFT_P90], figures[stats.NUM_TTFTS]) == (9.0, 11.0)
    clock.now_s = 60.0
    assert target.figures(engine(), None)[stats.NUM_TTFTS] == 0


def test_prefill_speed_is_learned_under_a_backlog_alone(clock):
    target = TargetScalingStats(clock)
    assert target.figures(engine(num_prompt_tokens=500), None)[stats.PREFILL_SPEED_KNOWN] == 0
    clock.now_s = 2.0
    idle = target.figures(engine(num_prompt_tokens=600, num_backlog_tokens=9), None)
    assert idle[stats.PREFILL_SPEED_KNOWN] == 0
    clock.now_s = 4.0
    cached = engine(num_prompt_tokens=2800, num_local_cached_tokens=200, num_backlog_tokens=9)
    figures = target.figures(cached, None)
    assert (figures[stats.PREFILL_SPEED], figures[stats.PREFILL_SPEED_KNOWN]) == (1000.0, 1.0)


def test_the_gain_is_the_pools_part_of_what_drafts_saved(clock):
    target = TargetScalingStats(clock)
    assert target.figures(engine(), SpeculatorStats())[stats.NUM_DRAFTED_STEPS] == 0
    spec = SpeculatorStats(
        step_time_s=2.0,
        plain_time_s=3.0,
        num_pool_accepted_tokens=30,
        num_local_accepted_tokens=10,
        num_table_hits=8,
        num_table_misses=2,
    )
    figures = target.figures(engine(), spec)
    assert figures[stats.DRAFT_GAIN] == pytest.approx(0.5 * 0.75)
    assert figures[stats.NUM_DRAFTED_STEPS] == 10
    assert target.figures(engine(), spec)[stats.NUM_DRAFTED_STEPS] == 0


def test_a_draft_replica_tells_rows_and_how_busy_it_was(clock):
    draft = DraftScalingStats(clock)
    assert not any(draft.figures(DraftServerStats(num_rows=5)).values())
    clock.now_s = 10.0
    figures = draft.figures(
        DraftServerStats(
            num_rows=505, num_batches=100, num_tables=90, num_superseded=10, batch_time_ewma_s=0.04
        )
    )
    assert figures == pytest.approx(
        {stats.ROWS_PER_S: 50.0, stats.BUSY_SHARE: 0.4, stats.LATE_SHARE: 0.1}
    )


def test_a_step_is_compared_with_plain_ones_for_as_many_tokens():
    times, meter = StepTimes(), GainMeter()
    meter.begin(4, 4)
    meter.end(times, 0.5, 2)
    assert meter.step_time_s == meter.plain_time_s == 0
    times.observe(4, 0.1)
    meter.begin(4, 4)
    meter.end(times, 0.12, 6)
    assert (meter.step_time_s, meter.plain_time_s) == pytest.approx((0.12, 0.25))
