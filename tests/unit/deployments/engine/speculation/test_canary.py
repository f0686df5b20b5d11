"""The rule that judges a candidate, against simulated sessions."""

from __future__ import annotations

import math
import random

import pytest

from deployments.engine.config import CanaryConfig
from deployments.engine.speculation.canary import Outcome, Tally, half_width, judge

RULE = CanaryConfig(min_sessions=20, min_rounds=100, max_sessions=400)


def session(rng: random.Random, score: float) -> tuple[int, int]:
    """Rounds and confirmed tokens of a text that is easier or harder than others."""
    num_rounds = rng.randrange(5, 60)
    chance = min(1.0, max(0.0, rng.gauss(score, 0.15)) / 3)
    return num_rounds, sum(rng.random() < chance for _ in range(3 * num_rounds))


def watch(seed: int, stable_score: float, candidate_score: float) -> tuple[Outcome, int]:
    """Judge behind every single session, as eagerly as can be."""
    rng = random.Random(seed)  # noqa: S311 - reproducible
    stable = candidate = Tally()
    for number in range(1, 2 * RULE.max_sessions):
        if rng.random() < 0.5:
            stable = stable.plus(*session(rng, stable_score))
        else:
            candidate = candidate.plus(*session(rng, candidate_score))
        outcome = judge(stable, candidate, RULE).outcome
        if outcome is not Outcome.UNDECIDED:
            return outcome, number
    return Outcome.UNDECIDED, number


def test_a_tally_is_the_ratio_of_sums_and_its_spread_over_sessions():
    sessions = [(10, 5), (20, 4), (5, 5), (40, 20)]
    tally = Tally()
    for num_rounds, num_confirmed in sessions:
        tally = tally.plus(num_rounds, num_confirmed)
    score = 34 / 75
    assert tally.score == pytest.approx(score)
    spread = sum((confirmed - score * rounds) ** 2 for rounds, confirmed in sessions) * 4 / 3
    assert tally.variance == pytest.approx(spread / 75**2)
    assert tally.plus(0, 0) == tally
    assert Tally().score == 0
    assert Tally().plus(3, 1).variance == math.inf


@pytest.mark.parametrize("seed", range(5))
def test_a_better_candidate_is_promoted_and_a_worse_one_rolled_back(seed):
    outcome, needed = watch(seed, 0.3, 0.6)
    assert outcome is Outcome.PROMOTED
    assert needed < 300
    assert watch(seed, 0.6, 0.3)[0] is Outcome.ROLLED_BACK


def test_looking_all_the_time_does_not_find_what_is_not_there():
    """Two equal drafters: the candidate is promoted by chance in few of many trials.

    The bound of a single look, 1.96 standard errors, promotes a fifth of them.
    """
    promoted = sum(watch(seed, 0.5, 0.5)[0] is Outcome.PROMOTED for seed in range(200))
    assert promoted <= 200 * RULE.error_rate


def test_a_candidate_that_shows_no_difference_is_given_up_in_the_end():
    same = Tally(1000, 20_000, 10_000, 450_000, 120_000, 220_000)
    verdict = judge(same, same, RULE)
    assert verdict.outcome is Outcome.ROLLED_BACK
    assert verdict.reason.startswith("not better: candidate 0.500 confirmed")


@pytest.mark.parametrize(("num_sessions", "num_rounds"), [(19, 900), (90, 99)])
def test_nothing_is_decided_by_too_few_sessions_or_rounds(num_sessions, num_rounds):
    few = Tally(num_sessions, num_rounds, 3 * num_rounds, 10_000, 90_000, 30_000)
    many = Tally(1000, 20_000, 0, 450_000, 0, 0)
    for stable, candidate in ((few, many), (many, few)):
        verdict = judge(stable, candidate, RULE)
        assert verdict.outcome is Outcome.UNDECIDED
        assert verdict.reason.startswith("too little to tell")


def test_less_spread_and_more_tolerance_leave_less_doubt():
    assert half_width(0.0, 0.05) == 0
    assert half_width(0.001, 0.05) < half_width(0.01, 0.05) < half_width(0.01, 0.01)
    # Never tighter than a single look allows.
    assert half_width(0.001, 0.05) > 1.96 * math.sqrt(0.001)


def test_a_trial_that_could_not_end_is_refused():
    with pytest.raises(ValueError, match="max_sessions"):
        CanaryConfig(min_sessions=30, max_sessions=20)
