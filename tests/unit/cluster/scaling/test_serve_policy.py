"""The policy as Ray Serve calls it: contexts in, replicas out, metrics and log lines beside."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingContext, AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from cluster.autoscaling import application_policy
from cluster.config import AutoscaleConfig, ClusterConfig, PoolConfig, PoolsConfig
from cluster.manifest import render
from cluster.scaling.serve_policy import JointPolicy
from cluster.scaling.signals import PoolState, draft_signals, target_signals
from deployments import scaling_stats as stats
from tests.fakes_metrics import exporter_for

if TYPE_CHECKING:
    from collections.abc import Mapping

SCALED = AutoscaleConfig(max_replicas=8, upscale_delay_s=3, downscale_delay_s=5, look_back_s=3)
CONFIG = ClusterConfig(
    pools=PoolsConfig(
        target=PoolConfig(autoscaling=SCALED),
        draft=PoolConfig(autoscaling=SCALED.model_copy(update={"min_replicas": 0})),
    )
)
TARGET, DRAFT = DeploymentID("target", "paceline"), DeploymentID("draft", "paceline")


class Point(NamedTuple):
    timestamp: float
    value: float


def context(
    deployment: DeploymentID, num: int, now_s: float, figures: Mapping[str, float]
) -> AutoscalingContext:
    """What Serve says of a pool whose replicas all report the same, just now."""
    raw: dict[str, Any] = {
        name: {f"r{index}": [Point(now_s, value)] for index in range(num)}
        for name, value in figures.items()
    }
    return AutoscalingContext(
        deployment_id=deployment,
        deployment_name=deployment.name,
        app_name=deployment.app_name,
        current_num_replicas=num,
        target_num_replicas=num,
        running_replicas=[],
        total_num_requests=0.0,
        total_queued_requests=lambda: 6.0,
        aggregated_metrics=None,
        raw_metrics=lambda: raw,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now_s,
        config=None,
    )


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def exporter(monkeypatch):
    return exporter_for(monkeypatch)


def joint_policy(
    clock: Clock, wall_clock: Clock | None = None, config: ClusterConfig = CONFIG
) -> JointPolicy:
    policy = application_policy(config)
    assert policy is not None
    return JointPolicy(**policy["policy_kwargs"], clock=clock, wall_clock=wall_clock or clock)


def test_serve_takes_the_policy_from_the_rendered_config():
    application = render(CONFIG).serve_config["applications"][0]
    schema = ServeDeploySchema(applications=[application]).applications[0]
    policy = AutoscalingPolicy(**schema.autoscaling_policy)
    loaded = policy.get_policy()
    assert loaded.__name__ == "JointPolicy"
    assert set(policy.policy_kwargs["pools"]) == {"target", "draft"}
    assert "autoscaling_policy" not in render(ClusterConfig()).serve_config["applications"][0]


def test_a_prefill_pool_moves_by_what_its_replicas_say(exporter):
    pools = PoolsConfig(prefill=PoolConfig(autoscaling=SCALED))
    clock = Clock()
    policy = joint_policy(clock, config=ClusterConfig(pools=pools))
    pool = DeploymentID("prefill", "paceline")
    decided: dict[Any, int] = {}
    for _ in range(5):
        decided, _ = policy({pool: context(pool, 2, clock.now_s, {stats.OPEN: 13.0})})
        clock.now_s += 1
    assert decided == {pool: 4}


def test_pools_move_by_what_their_replicas_say_and_it_is_explained(exporter, caplog):
    clock = Clock()
    policy = joint_policy(clock)
    decided: dict[Any, int] = {}
    with caplog.at_level(logging.INFO, "ray.serve"):
        for _ in range(9):
            decided, state = policy(
                {
                    TARGET: context(TARGET, 2, clock.now_s, {stats.OPEN: 17.0}),
                    DRAFT: context(DRAFT, 1, clock.now_s, {stats.BUSY_SHARE: 0.5}),
                }
            )
            assert state == {}
            clock.now_s += 1
    # 2 * 17 at the replicas and 6 before them, 8 a replica.
    assert decided == {TARGET: 5, DRAFT: 2}
    scrape = exporter.scrape()
    assert scrape["autoscaling_replicas", "target"] == 5
    assert scrape["autoscaling_need_replicas", "requests", "target"] == 5
    assert scrape["autoscaling_decisions_total", "requests", "up", "target"] >= 1
    lines = [record.getMessage() for record in caplog.records]
    assert any("target: grow 2 -> 5: needs kv_pages 0.00, requests 5.00" in one for one in lines)


def test_pools_that_keep_their_size_are_left_to_themselves(exporter):
    clock = Clock()
    policy = joint_policy(clock)
    for _ in range(20):
        decided, _ = policy(
            {
                TARGET: context(TARGET, 2, clock.now_s, {stats.OPEN: 5.0}),
                # Serve would start one at once, for six requests wait; none says that it pays.
                DRAFT: context(DRAFT, 0, clock.now_s, {}),
            }
        )
        assert TARGET not in decided
        clock.now_s += 0.5


def test_a_wall_clock_that_is_set_back_holds_nothing_up(exporter):
    clock, wall_clock = Clock(), Clock()
    policy = joint_policy(clock, wall_clock)
    decided: dict[Any, int] = {}
    for _ in range(9):
        figures = {stats.OPEN: 17.0}
        decided, _ = policy({TARGET: context(TARGET, 2, wall_clock.now_s, figures)})
        clock.now_s += 1
        wall_clock.now_s -= 100
    assert decided == {TARGET: 5}


def test_a_policy_that_fails_holds_all_pools(exporter, caplog):
    clock = Clock()
    policy = joint_policy(clock)
    assert policy({TARGET: None}) == ({}, {})
    assert "pools keep their sizes" in caplog.text


def state(reports, num_running=2, **changes) -> PoolState:
    fields = {"num_target": num_running, "num_requests": 3.0, "num_queued": 1.0}
    return PoolState("pool", num_running=num_running, reports=reports, **(fields | changes))


def test_what_is_old_counts_as_not_said():
    reports = {stats.OPEN: {"old": [(0.0, 100.0)], "new": [(95.0, 2.0), (99.0, 4.0)]}}
    signals = target_signals(state(reports), 100.0, 30.0)
    assert signals.num_reporting == 1
    # The silent one is taken for an average one.
    assert signals.num_requests == 2 * 3 + 1
    assert target_signals(state({}), 100.0, 30.0).num_reporting == 0


def test_figures_without_weight_are_unknown():
    def told(**figures):
        return {name: {"r": [(99.0, value)]} for name, value in figures.items()}

    silent = target_signals(state(told(ttft_p90_s=0.0, num_ttfts=0.0)), 100.0, 30.0)
    assert silent.ttft_p90_s is silent.draft_gain is None
    assert silent.prefill_tokens_per_s == 0
    known = told(
        ttft_p90_s=1.5,
        num_ttfts=4.0,
        draft_gain=0.2,
        num_drafted_steps=9.0,
        prefill_tokens_per_s=700.0,
        prefill_speed_known=1.0,
    )
    signals = target_signals(state(known), 100.0, 30.0)
    assert (signals.ttft_p90_s, signals.draft_gain, signals.prefill_tokens_per_s) == pytest.approx(
        (1.5, 0.2, 700.0)
    )


def test_a_draft_pool_is_summed_over_its_replicas():
    reports = {
        stats.ROWS_PER_S: {"a": [(99.0, 100.0)], "b": [(99.0, 300.0)]},
        stats.BUSY_SHARE: {"a": [(99.0, 0.5)], "b": [(99.0, 0.9)]},
        stats.LATE_SHARE: {"a": [(99.0, 0.0)], "b": [(99.0, 0.2)]},
    }
    signals = draft_signals(state(reports), 100.0, 30.0)
    assert (signals.num_rows_per_s, signals.num_busy, signals.late_share) == pytest.approx(
        (400, 1.4, 0.1)
    )
    assert signals.num_requests == 3
