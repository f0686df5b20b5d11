"""Arrivals: their number, their regularity, and what a profile may say."""

from __future__ import annotations

from itertools import pairwise
from statistics import mean, pvariance

import pytest

from cluster.errors import ConfigError
from cluster.load.arrivals import Segment, arrival_times, parse_profile


def test_a_profile_is_held_ramped_and_swung():
    steady, ramp, wave = parse_profile("2:60, 2-16:30,1~5:10")
    assert steady == Segment(2, 2, 60)
    assert ramp == Segment(2, 16, 30)
    assert wave == Segment(1, 5, 10, is_wave=True)
    assert ramp.rate(15) == 9
    assert wave.rate(0) == pytest.approx(1)
    assert wave.rate(5) == pytest.approx(5)
    assert wave.rate(10) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "2", "x:3", "2:", "2:0", "-1:5", "1-:5", "2:inf", "nan:1"])
def test_another_profile_is_refused_by_its_part(text):
    with pytest.raises(ConfigError, match="--rate"):
        parse_profile(f"1:1,{text}")


@pytest.mark.parametrize("burstiness", [0.0, 0.25, 1.0, 4.0])
def test_gaps_vary_as_told(burstiness):
    times = list(arrival_times([Segment(50, 50, 400)], burstiness=burstiness, seed=3))
    gaps = [after - before for before, after in pairwise(times)]
    assert len(times) == pytest.approx(20_000, rel=0.05)
    assert pvariance(gaps) / mean(gaps) ** 2 == pytest.approx(burstiness, rel=0.15, abs=1e-6)


def test_a_ramp_has_its_arrivals_where_its_rate_is():
    times = list(arrival_times([Segment(0, 100, 100)], burstiness=0, seed=0))
    # The integral of the rate, t * t / 2.
    assert len(times) == pytest.approx(5000, abs=2)
    assert sum(at < 50 for at in times) == pytest.approx(1250, abs=2)
    assert times == sorted(times)


def test_a_pause_has_no_arrival():
    pause = [Segment(10, 10, 5), Segment(0, 0, 20), Segment(10, 10, 5)]
    times = list(arrival_times(pause, burstiness=1, seed=1))
    assert any(at < 5 for at in times)
    assert any(at > 25 for at in times)
    assert not any(5.001 < at < 24.999 for at in times)
    assert all(at <= 30 for at in times)


def test_a_seed_is_a_schedule():
    profile = parse_profile("5:20")
    first, again, other = (
        list(arrival_times(profile, burstiness=1, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
