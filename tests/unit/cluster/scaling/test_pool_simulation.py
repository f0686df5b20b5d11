"""The policy over minutes of a pool whose replicas take a while to start, in milliseconds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scaling.config import AutoscaleConfig, ScalingConfig
from tests.unit.cluster.scaling.pool_simulation import PoolSimulation

_MOST = 6
_SLO_S = 5.0
_SCALED = AutoscaleConfig(
    min_replicas=1,
    max_replicas=_MOST,
    target_ongoing_requests=3,
    upscale_delay_s=2,
    downscale_delay_s=40,
    look_back_s=4,
)
_STATIC = AutoscaleConfig(min_replicas=_MOST, max_replicas=_MOST)
_SCALING = ScalingConfig(ttft_slo_s=_SLO_S)
_RUN_S = 570


def the_loadtests_rate(at_s: float) -> float:
    """Of ``make loadtest-autoscale``."""
    if at_s < 120:
        return 1.0
    if at_s < 150:
        return 1.0 + 7 * (at_s - 120) / 30
    return 8.0 if at_s < 330 else 1.0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("start_s", [3.0, 10.0, 25.0])
@pytest.mark.parametrize("role", ["target", "prefill"])
def test_a_pool_serves_eight_times_its_load_almost_as_well_as_a_large_one_for_much_less(
    role, start_s, seed
):
    scaled, static = (
        PoolSimulation(pool, _SCALING, start_s=start_s, seed=seed, role=role).run(
            the_loadtests_rate, _RUN_S
        )
        for pool in (_SCALED, _STATIC)
    )
    assert scaled.good(_SLO_S) >= 0.95 * static.good(_SLO_S)
    assert scaled.replica_seconds <= 0.65 * static.replica_seconds
    grown, shrunk = scaled.growths_and_shrinks_s()
    assert max(scaled.sizes) >= 5
    assert scaled.sizes[-1] <= 2
    # At the peak it moves in one direction.
    assert not [at_s for at_s in shrunk if 120 <= at_s < 330]
    assert [at_s for at_s in grown if 120 <= at_s < 200]


def test_slow_starts_cost_requests_and_no_more_replicas_than_there_may_be():
    good = []
    for start_s in (8.0, 60.0):
        told = PoolSimulation(_SCALED, _SCALING, start_s=start_s).run(the_loadtests_rate, _RUN_S)
        good.append(told.good(_SLO_S))
        assert max(told.sizes) == _MOST
        assert told.sizes[-1] <= 2
    assert good[1] < good[0]


@settings(max_examples=40)
@given(
    rate=st.floats(0.1, 12.0),
    start_s=st.floats(0.5, 60.0),
    service_s=st.floats(0.5, 4.0),
    seed=st.integers(0, 1000),
)
def test_what_is_added_stays_for_the_downscale_delay_at_least(rate, start_s, service_s, seed):
    told = PoolSimulation(_SCALED, _SCALING, start_s=start_s, service_s=service_s, seed=seed).run(
        lambda _: rate, 300
    )
    grown, shrunk = told.growths_and_shrinks_s()
    for at_s in grown:
        assert not [later for later in shrunk if at_s < later < at_s + _SCALED.downscale_delay_s]
