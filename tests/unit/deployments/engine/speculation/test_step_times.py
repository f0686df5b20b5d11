import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.step_times import StepTimes


def learned(seconds_of, widths, num_steps=400, noise=0.0):
    rng = random.Random(0)  # noqa: S311
    times = StepTimes()
    for _ in range(num_steps):
        width = rng.choice(widths)
        times.observe(width, seconds_of(width) * rng.uniform(1 - noise, 1 + noise))
    return times


def test_nothing_is_known_before_the_first_step():
    times = StepTimes()
    assert not times.is_known
    times.observe(0, 1.0)
    times.observe(3, 0.0)
    assert not times.is_known
    with pytest.raises(LookupError):
        times.seconds(1)


def test_a_width_between_two_measured_ones_lies_between_them():
    times = learned(lambda rows: 0.010 + 0.001 * rows, [1, 3, 5, 8])
    for rows in (1, 2, 3, 4, 6, 8, 12):
        assert times.seconds(rows) == pytest.approx(0.010 + 0.001 * rows, rel=0.02)


def test_untried_widths_look_cheap():
    times = learned(lambda rows: 0.02, [2])
    assert times.seconds(9) == times.seconds(2) == times.seconds(1) == pytest.approx(0.02)


def test_noise_never_makes_wider_steps_look_faster():
    times = learned(lambda rows: 0.05, [1, 2, 3, 4, 5, 6], noise=0.3)
    curve = [times.seconds(rows) for rows in range(1, 9)]
    assert curve == sorted(curve)
    assert curve[0] == pytest.approx(0.05, rel=0.15)


def test_a_machine_that_slows_down_slows_all_widths():
    times = learned(lambda rows: 0.01 * rows, [1, 4])
    for _ in range(30):
        times.observe(4, 0.08)
    assert times.seconds(4) == pytest.approx(0.08, rel=0.1)
    assert times.seconds(1) > 0.012


def test_one_pause_of_the_machine_teaches_little():
    times = learned(lambda rows: 0.01, [1, 2])
    times.observe(2, 30.0)
    assert times.seconds(2) < 0.0125


def test_what_was_not_seen_lately_is_not_fresh():
    times = learned(lambda rows: 0.01, [3])
    assert times.is_fresh(3)
    assert not times.is_fresh(2)
    for _ in range(600):
        times.observe(5, 0.01)
    assert not times.is_fresh(3)


@given(st.lists(st.tuples(st.integers(1, 600), st.floats(1e-6, 10)), min_size=1, max_size=60))
def test_the_curve_rises_and_is_positive(steps):
    times = StepTimes()
    for rows, seconds in steps:
        times.observe(rows, seconds)
    curve = [times.seconds(rows) for rows in range(1, 700, 3)]
    assert curve[0] > 0
    assert all(left <= right * (1 + 1e-9) for left, right in itertools.pairwise(curve))
