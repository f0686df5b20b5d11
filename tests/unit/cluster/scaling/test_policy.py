"""What the autoscaling policy promises, whatever replicas say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.scaling.config import AutoscaleConfig, ScalingConfig
from cluster.scaling.policy import Memory, Rules, Signals, decide
from cluster.scaling.signals import DraftSignals, PoolSignals, TargetSignals

RULES = Rules(
    {
        "ingress": AutoscaleConfig(max_replicas=4, target_ongoing_requests=50),
        "target": AutoscaleConfig(
            max_replicas=10,
            target_ongoing_requests=8,
            upscale_delay_s=5,
            downscale_delay_s=30,
            look_back_s=5,
        ),
        "draft": AutoscaleConfig(
            min_replicas=0, max_replicas=6, upscale_delay_s=5, downscale_delay_s=30, look_back_s=5
        ),
    },
    ScalingConfig(retry_drafts_s=100, slo_memory_s=1000),
)


def target(num: int = 2, **changes) -> TargetSignals:
    signals = TargetSignals(
        name="target", num_target=num, num_running=num, num_reporting=num, num_requests=8.0 * num
    )
    return replace(signals, **changes)


def draft(num: int = 1, **changes) -> DraftSignals:
    signals = DraftSignals(
        name="draft",
        num_target=num,
        num_running=num,
        num_reporting=num,
        num_requests=0.0,
        num_rows_per_s=500.0 * num,
        num_busy=0.7 * num,
    )
    return replace(signals, **changes)


class Sizes(NamedTuple):
    target: int
    draft: int


class Cluster:
    """Does at once what the policy decides, and remembers how it came about."""

    def __init__(self, num_targets: int = 2, num_drafts: int = 1) -> None:
        self.sizes = Sizes(num_targets, num_drafts)
        self.memory = Memory()
        self.now_s = 1000.0
        self.history: list[Sizes] = []
        self.causes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    def run(self, seconds: int, signals) -> Cluster:
        """Args: signals: from sizes to target and draft signals."""
        for _ in range(seconds):
            its_target, its_draft = signals(self.sizes)
            decisions, self.memory = decide(
                self.memory, Signals(now_s=self.now_s, target=its_target, draft=its_draft), RULES
            )
            found = {decision.pool: decision for decision in decisions}
            sizes = {name: decision.num_replicas for name, decision in found.items()}
            self.sizes = self.sizes._replace(**sizes)
            self.causes |= {name: decision.cause for name, decision in found.items()}
            self.reasons |= {name: decision.reason for name, decision in found.items()}
            self.history.append(self.sizes)
            self.now_s += 1
        return self


def load_of(num_requests: float, **changes):
    """A load that is the same whatever the pool's size."""

    def signals(sizes: Sizes):
        return target(sizes.target, num_requests=num_requests, **changes), None

    return signals


@pytest.mark.parametrize(
    ("backlog", "cause", "num_replicas"), [(0.0, "requests", 2), (51_200.0, "prefill", 8)]
)
def test_a_prefill_pool_is_sized_for_its_requests_and_the_tokens_they_wait_for(
    backlog, cause, num_replicas
):
    rules = replace(RULES, pools={"prefill": RULES.pools["target"]})
    signals = target(num_requests=16.0, num_backlog_tokens=backlog, prefill_tokens_per_s=4000.0)
    # What is a missed SLO at a target says nothing here.
    signals = replace(signals, name="prefill", ttft_p90_s=60.0)
    memory, decision = Memory(), None
    for second in range(7):
        now_s = 1000.0 + second
        [decision], memory = decide(memory, Signals(now_s=now_s, prefill=signals), rules)
    assert (decision.pool, decision.cause) == ("prefill", cause)
    assert decision.num_replicas == num_replicas
    assert memory.floors == ()


def test_load_moves_the_target_pool_once_it_has_lasted():
    cluster = Cluster().run(4, load_of(60))
    assert cluster.sizes.target == 2
    assert cluster.run(4, load_of(60)).sizes.target == 7
    assert cluster.causes["target"] == "requests"
    assert cluster.reasons["target"].startswith("keep 7 -> 7: needs kv_pages 0.00, requests 7.50")
    assert cluster.run(29, load_of(8)).sizes.target == 7
    assert cluster.run(4, load_of(8)).sizes.target == 2


def test_a_spike_and_a_dip_move_nothing():
    cluster = Cluster(4).run(40, load_of(32))
    for _ in range(5):
        assert cluster.run(3, load_of(80)).sizes.target == 4
        assert cluster.run(20, load_of(0)).sizes.target == 4
        cluster.run(1, load_of(32))


@pytest.mark.parametrize(
    ("changes", "cause", "num"),
    [
        ({"kv_share": 1.0}, "kv_pages", 3),
        ({"num_backlog_tokens": 8000.0, "prefill_tokens_per_s": 1000.0}, "prefill", 5),
    ],
)
def test_full_pages_and_a_backlog_of_prompts_ask_for_replicas(changes, cause, num):
    def signals(sizes):
        return target(2, num_requests=1, **changes), None

    cluster = Cluster(2).run(8, signals)
    assert (cluster.causes["target"], cluster.history[-1].target) == (cause, num)


def missed_below(num: int):
    """A load whose SLO is missed with fewer replicas than this."""

    def signals(sizes: Sizes):
        ttft_s = 3.0 if sizes.target < num else 0.5
        return target(sizes.target, num_requests=12, ttft_p90_s=ttft_s), None

    return signals


def test_a_missed_slo_adds_replicas_and_is_not_missed_again_for_the_same_load():
    cluster = Cluster(2).run(2000, missed_below(4))
    sizes = [size.target for size in cluster.history]
    assert sizes[80] == 4
    assert set(sizes[80:950]) == {4}
    # The load fell: its replicas may go.
    assert cluster.run(60, load_of(3)).sizes.target == 1


def test_waits_that_are_told_of_after_a_burst_keep_no_replicas():
    cluster = Cluster(2).run(300, load_of(16, ttft_p90_s=3.0))
    assert cluster.sizes.target > 2
    # Five seconds of load are averaged; fifteen of waits are told of, and averaged as well.
    for second in range(20):
        cluster.run(1, load_of(max(0.0, 16 - 3.2 * second), ttft_p90_s=3.0))
    assert cluster.run(35, load_of(0)).sizes.target == 1


def test_a_wait_is_of_the_load_that_it_began_under():
    cluster = Cluster(2).run(100, load_of(16))
    # A standstill ends: those who waited get their tokens, and leave, one by one.
    for second in range(80):
        cluster.run(1, load_of(16 - second / 5, ttft_p90_s=90.0))
    assert cluster.run(100, load_of(1)).sizes.target == 1


def test_what_a_larger_load_took_says_nothing_of_a_smaller_one():
    cluster = Cluster(2).run(200, missed_below(4))
    cluster.run(100, load_of(60, ttft_p90_s=3.0))
    assert cluster.sizes.target == 10
    # The four that it took, and the tolerance.
    assert cluster.run(100, missed_below(4)).sizes.target == 5


def test_waiting_times_of_a_pool_that_still_starts_do_not_count():
    def starting(sizes: Sizes):
        return target(sizes.target, num_running=2, num_reporting=2, ttft_p90_s=9.0), None

    cluster = Cluster(3).run(60, starting)
    assert max(size.target for size in cluster.history) == 3


def test_waits_of_before_replicas_were_added_do_not_count():
    def slow(sizes: Sizes):
        return target(sizes.target, num_requests=12, ttft_p90_s=9.0), None

    # Replicas tell of the waits of the last 15 s, and five seconds of that are averaged.
    cluster = Cluster(3).run(20, slow)
    assert cluster.sizes.target == 3
    assert cluster.run(15, slow).sizes.target > 3


@pytest.mark.parametrize("num_reporting", [0, 1])
def test_a_pool_that_says_nothing_is_held(num_reporting):
    def silent(sizes: Sizes):
        signals = target(sizes.target, num_requests=0, num_reporting=num_reporting)
        return signals, draft(sizes.draft, num_busy=0, num_reporting=0)

    cluster = Cluster(4, 3).run(200, silent)
    assert set(cluster.history) == {Sizes(4, 3)}
    assert cluster.causes == {"target": "no_data", "draft": "no_data"}
    # What was known before the gap is forgotten: shrinking needs its whole window again.
    assert cluster.run(29, load_of(0)).sizes.target == 4
    assert cluster.run(5, load_of(0)).sizes.target == 1


def busy(share_of_one: float, **changes):
    """Rows that keep so many draft replicas busy."""

    def signals(sizes: Sizes):
        busy_now = min(float(sizes.draft), share_of_one)
        return target(2, **changes), draft(sizes.draft, num_busy=busy_now)

    return signals


def test_rows_size_the_draft_pool():
    assert Cluster(2, 4).run(60, busy(1.4)).sizes.draft == 3
    cluster = Cluster(2, 1).run(8, lambda sizes: (target(2), draft(1, num_busy=1, late_share=1.0)))
    assert cluster.history[-1].draft == 3


def test_more_targets_bring_more_drafts_before_they_ask():
    cluster = Cluster(2, 2)

    def signals(sizes: Sizes):
        return (
            target(sizes.target, num_running=2, num_reporting=2, num_requests=64),
            draft(sizes.draft, num_busy=1.4),
        )

    cluster.run(12, signals)
    assert cluster.sizes == Sizes(8, 6)


def test_drafts_that_do_not_pay_go_and_are_tried_again():
    cluster = Cluster(2, 2).run(25, busy(1.4, draft_gain=0.01))
    assert cluster.sizes.draft == 2
    cluster.run(8, busy(1.4, draft_gain=0.01))
    assert cluster.sizes.draft == 0
    assert cluster.causes["draft"] == "does_not_pay"
    cluster.run(95, busy(0))
    assert cluster.sizes.draft == 0
    cluster.run(15, busy(0))
    assert cluster.sizes.draft == 1
    assert Cluster(2, 2).run(200, busy(1.4, draft_gain=0.5)).sizes.draft == 2


def test_drafts_are_no_more_than_they_are_worth():
    # Two targets that gain a quarter each save half a target: two draft replicas' worth.
    cluster = Cluster(2, 4).run(60, busy(3.5, draft_gain=0.25))
    assert (cluster.sizes.draft, cluster.causes["draft"]) == (3, "rows_worth_it")


def test_nobody_asks_and_no_draft_replica_waits():
    cluster = Cluster(2, 2)
    cluster.run(40, lambda sizes: (target(2, num_requests=0), draft(sizes.draft, num_busy=0)))
    assert cluster.sizes.draft == 0
    cluster.run(7, lambda sizes: (target(2, num_requests=1), draft(sizes.draft, num_busy=0)))
    assert cluster.sizes.draft == 1


def test_the_ingress_pool_follows_its_requests():
    pool = PoolSignals(
        name="ingress", num_target=1, num_running=1, num_reporting=1, num_requests=140
    )
    memory = Memory()
    for now_s in range(12):
        (decision,), memory = decide(memory, Signals(now_s=now_s, ingress=pool), RULES)
    assert decision.num_replicas == 3


positive = st.floats(0, 1e6, allow_nan=False)
share = st.floats(0, 1)
count = st.integers(0, 12)
any_target = st.builds(
    TargetSignals,
    name=st.just("target"),
    num_target=st.integers(1, 10),
    num_running=count,
    num_reporting=count,
    num_requests=positive,
    kv_share=share,
    num_backlog_tokens=positive,
    prefill_tokens_per_s=positive,
    ttft_p90_s=st.none() | positive,
    draft_gain=st.none() | st.floats(-1, 10),
)
any_draft = st.builds(
    DraftSignals,
    name=st.just("draft"),
    num_target=st.integers(0, 6),
    num_running=count,
    num_reporting=count,
    num_requests=positive,
    num_rows_per_s=positive,
    num_busy=positive,
    late_share=share,
)


@given(st.lists(st.tuples(st.floats(0, 40), any_target, any_draft), min_size=1, max_size=30))
def test_every_decision_is_within_bounds_and_explained(steps):
    memory, now_s = Memory(), 0.0
    for pause_s, its_target, its_draft in steps:
        now_s += pause_s
        signals = Signals(now_s=now_s, target=its_target, draft=its_draft)
        decisions, memory = decide(memory, signals, RULES)
        assert [decision.pool for decision in decisions] == ["target", "draft"]
        for decision in decisions:
            pool = RULES.pools[decision.pool]
            assert pool.min_replicas <= decision.num_replicas <= pool.max_replicas
            assert decision.cause
            assert decision.reason
        if its_target.num_reporting < its_target.num_running / 2:
            assert decisions[0].num_replicas == decisions[0].before


@given(positive, positive, st.integers(1, 10))
def test_more_load_never_means_fewer_replicas(one, other, num):
    low, high = sorted((one, other))
    ends = [
        Cluster(num).run(40, lambda sizes, load=load: load_of(load)(sizes)).sizes.target
        for load in (low, high)
    ]
    assert ends[0] <= ends[1]


@given(
    st.floats(0, 100),
    st.integers(1, 10),
    st.lists(st.floats(0.91, 1.09), min_size=1, max_size=20),
)
def test_a_steady_load_never_moves_a_pool_back_and_forth(load, num, noise):
    cluster = Cluster(num)
    for second in range(150):
        cluster.run(1, load_of(load * noise[second % len(noise)]))
    sizes = [num, *(size.target for size in cluster.history)]
    steps = {(after > before) - (after < before) for before, after in pairwise(sizes)}
    assert not {1, -1} <= steps
