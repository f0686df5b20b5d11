"""Where a prompt is computed, decided by what is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.config import PrefillConfig
from deployments.prefill_choice import Prompt, PromptCosts, Reason, TokenCost, choose

CONFIG = PrefillConfig(min_tokens=1000, max_in_flight=4, max_slowdown=1.5)
LONG = Prompt(num_tokens=4000, num_uncached=4000, num_backlog=0, num_in_flight=0)
NOW = 100.0


def costs(here=None, pool=None, load=None) -> PromptCosts:
    """Seconds of one token, all measured now."""
    known = PromptCosts()
    for cost, seconds in ((known.here, here), (known.pool, pool), (known.load, load)):
        if seconds is not None:
            cost.learn(seconds, 1, NOW)
    return known


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, Reason.SENT),
        ({"num_tokens": 999, "num_uncached": 999}, Reason.SHORT),
        ({"num_uncached": 999}, Reason.CACHED),
        ({"num_uncached": 1000}, Reason.SENT),
        ({"is_reusable": False}, Reason.UNUSED),
        ({"num_in_flight": 3}, Reason.SENT),
        ({"num_in_flight": 4}, Reason.BUSY),
    ],
)
def test_what_is_known_of_the_prompt(changes, reason):
    assert choose(replace(LONG, **changes), PromptCosts(), CONFIG, NOW) is reason


@pytest.mark.parametrize(
    ("measured", "num_backlog", "reason"),
    [
        ({"here": 0.001}, 0, Reason.SENT),
        ({"pool": 0.5}, 0, Reason.SENT),
        ({"here": 0.001, "pool": 0.0014}, 0, Reason.SENT),
        ({"here": 0.001, "pool": 0.0016}, 0, Reason.COST),
        ({"here": 0.001, "pool": 0.0014, "load": 0.0002}, 0, Reason.COST),
        ({"here": 0.001, "pool": 0.0016}, 4000, Reason.SENT),
    ],
)
def test_what_was_measured(measured, num_backlog, reason):
    prompt = replace(LONG, num_backlog=num_backlog)
    assert choose(prompt, costs(**measured), CONFIG, NOW) is reason


def test_a_pool_that_was_too_slow_is_tried_again_once_that_is_forgotten():
    slow = costs(here=0.001, pool=1.0)
    assert choose(LONG, slow, CONFIG, NOW + 59) is Reason.COST
    assert choose(LONG, slow, CONFIG, NOW + 61) is Reason.SENT


def test_a_cost_follows_what_is_seen_and_learns_nothing_of_no_tokens():
    cost = TokenCost()
    cost.learn(1.0, 0, NOW)
    assert cost.at(NOW) is None
    cost.learn(2.0, 100, NOW)
    assert cost.at(NOW) == pytest.approx(0.02)
    cost.learn(4.0, 100, NOW)
    assert cost.at(NOW) == pytest.approx(0.02 + 0.3 * 0.02)
    cost.learn(1.0, 100, NOW + 1000)
    assert cost.at(NOW + 1000) == pytest.approx(0.01), "what was before is forgotten"


@given(
    backlog=st.integers(0, 10**6),
    more=st.integers(0, 10**6),
    here=st.floats(1e-6, 10),
    pool=st.floats(1e-6, 10),
)
def test_a_longer_queue_here_never_keeps_a_prompt_here(backlog, more, here, pool):
    known = costs(here=here, pool=pool)
    before = choose(replace(LONG, num_backlog=backlog), known, CONFIG, NOW)
    after = choose(replace(LONG, num_backlog=backlog + more), known, CONFIG, NOW)
    assert before is not Reason.SENT or after is Reason.SENT
