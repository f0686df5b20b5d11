"""The figures of ``make loadtest-autoscale``."""

from __future__ import annotations

import pytest

from cluster.load.arrivals import parse_profile
from tests.bench.autoscale.plan import MAX_DRAFTS, MAX_TARGETS, Plan
from tests.bench.autoscale.plot import draw
from tests.bench.autoscale.report import compare, explained, moves, replica_seconds, table


def sampled(*sizes: int) -> list[dict]:
    return [
        {"at_s": float(10 * index), "replicas": {"target": size, "draft": size}}
        for index, size in enumerate(sizes)
    ]


def run(num_good: int, samples: list[dict], **fields) -> dict:
    summary = {
        "num_requests": 100,
        "num_good": num_good,
        "num_rejected": 0,
        "num_failed": 100 - num_good,
        "ttft_s": {"percentiles": {"p50": 0.1, "p99": 1.0}},
    }
    return {"all": summary, "replicas": samples, "lost": [], "decisions": []} | fields


def told(*ways: str) -> dict:
    """Decisions of both pools, in these directions."""
    words = {"up": "grow 1 -> 2", "down": "shrink 2 -> 1"}
    lines = [f"autoscaling: {pool}: {words[way]}" for pool in ("target", "draft") for way in ways]
    metric = {pool: dict.fromkeys(ways, 3.0) for pool in ("target", "draft")}
    return {"log": lines, "metric": metric}


def test_the_load_has_the_phases_that_are_asked_for():
    plan = Plan(2.0, 1.0)
    segments = parse_profile(plan.profile)
    assert [(each.begin, each.end, each.seconds) for each in segments] == [
        (2, 2, 120),
        (2, 16, 30),
        (16, 16, 180),
        (2, 2, 240),
    ]
    assert Plan(2.0, 0.5).seconds == plan.seconds / 2
    expected = 2 * 120 + 9 * 30 + 16 * 180 + 2 * 240
    assert len(plan.schedule()) == pytest.approx(expected, rel=0.1)


def test_one_cluster_is_always_as_large_as_the_other_may_become():
    plan = Plan(1.0, 1.0)
    scaled, static = plan.config(is_static=False).pools, plan.config(is_static=True).pools
    assert scaled.draft is not None
    assert static.draft is not None
    assert scaled.target.autoscaling is not None
    assert scaled.draft.autoscaling is not None
    assert static.target.replicas == scaled.target.autoscaling.max_replicas == MAX_TARGETS
    assert static.draft.replicas == scaled.draft.autoscaling.max_replicas == MAX_DRAFTS
    assert plan.updated() != plan.config(is_static=False)


def test_replicas_are_counted_over_time_and_no_longer_than_the_load():
    samples = sampled(1, 3, 2)
    assert replica_seconds(samples, "target", 30.0) == 10 * 1 + 10 * 3 + 10 * 2
    assert replica_seconds(samples, "target", 15.0) == 10 * 1 + 5 * 3
    assert replica_seconds(samples, "other", 30.0) == 0
    assert moves(samples, "target") == (1, 1)


def test_bars_hold_or_are_missed():
    static = run(100, sampled(4, 4, 4))
    good = run(
        95,
        sampled(1, 3, 1),
        is_updated={"began_s": 25.0, "ended_s": 28.0},
        drafts_rest={"gone_after_s": 1.0, "back_after_s": 2.0},
        explained=told("up", "down"),
    )
    report = compare(good, static, 30.0)
    assert all(bar["holds"] for bar in report["bars"].values())
    assert "MISSED" not in table(report)
    bad = run(
        80,
        sampled(4, 4, 4),
        is_updated="it failed",
        lost=[{"error": "x"}],
        drafts_rest="still there",
        explained=told("up"),
    )
    report = compare(bad, static, 30.0)
    assert not any(bar["holds"] for bar in report["bars"].values())
    assert table(report).count("MISSED") == len(report["bars"])


def test_a_pool_that_only_the_update_moved_did_not_scale():
    update = {"began_s": 5.0, "ended_s": 28.0}
    parts = {"drafts_rest": "no", "explained": told(), "is_updated": update}
    moved = run(95, sampled(1, 2, 1), **parts)
    bars = compare(moved, run(100, sampled(4, 4, 4)), 30.0)["bars"]
    assert bars["target_pool_moves"] == {
        "value": {"up": 0, "down": 0},
        "bar": "both",
        "holds": False,
    }


def test_a_pool_is_explained_in_the_log_and_in_the_metric():
    assert explained(told("up"), "draft") == {
        "grow in the log": 1,
        "shrink in the log": 0,
        "up in the metric": 3,
        "down in the metric": 0,
    }
    assert not any(explained({"log": [], "metric": {}}, "target").values())


def test_one_picture_shows_both_runs(tmp_path):
    pytest.importorskip("matplotlib")
    steps = [{"at_s": 0.0, "due": 4, "good": 3}, {"at_s": 10.0, "due": 0, "good": 0}]
    runs = {
        name: run(90, sampled(1, 2), timeline=steps, is_updated=update)
        for name, update in (("autoscaled", {"began_s": 3.0, "ended_s": 8.0}), ("static", None))
    }
    assert draw(runs, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 1000
