from prometheus_client.parser import text_string_to_metric_families

from cluster.commands.status import _autoscaling, _drafters, _prefill, _speculation
from cluster.metrics_reader import MetricsSnapshot

SCRAPE = """
# TYPE ray_paceline_draft_tokens_total counter
ray_paceline_draft_tokens_total{origin="pool",ReplicaId="a"} 30
ray_paceline_draft_tokens_total{origin="pool",ReplicaId="b"} 10
ray_paceline_draft_tokens_total{origin="local",ReplicaId="a"} 5
# TYPE ray_paceline_accepted_draft_tokens_total counter
ray_paceline_accepted_draft_tokens_total{origin="pool",ReplicaId="a"} 12
# TYPE ray_paceline_withheld_draft_tokens_total counter
ray_paceline_withheld_draft_tokens_total{reason="cost",ReplicaId="a"} 7
ray_paceline_withheld_draft_tokens_total{reason="target",ReplicaId="a"} 2
# TYPE ray_paceline_tpot_target_steps_total counter
ray_paceline_tpot_target_steps_total{result="met",ReplicaId="a"} 5
# TYPE ray_paceline_outcome_tables_total counter
ray_paceline_outcome_tables_total{result="in_time",ReplicaId="a"} 9
ray_paceline_outcome_tables_total{result="late",ReplicaId="a"} 1
"""


def snapshot(text):
    families = text_string_to_metric_families(text)
    return MetricsSnapshot([sample for family in families for sample in family.samples])


def test_speculation_is_told_by_what_became_of_drafts():
    assert _speculation(snapshot(SCRAPE)) == {
        "verified (local)": 5,
        "verified (pool)": 40,
        "accepted (pool)": 12,
        "withheld (cost)": 7,
        "withheld (target)": 2,
        "TPOT targets met": 5,
        "tables in time": 9,
        "tables late": 1,
    }


def test_a_cluster_that_drafted_nothing_tells_nothing():
    assert _speculation(snapshot("")) == {}


TRIAL = """
# TYPE ray_paceline_draft_scored_rounds_total counter
ray_paceline_draft_scored_rounds_total{drafter="stable",ReplicaId="a"} 60
ray_paceline_draft_scored_rounds_total{drafter="stable",ReplicaId="b"} 20
ray_paceline_draft_scored_rounds_total{drafter="candidate",ReplicaId="a"} 10
# TYPE ray_paceline_draft_confirmed_tokens_total counter
ray_paceline_draft_confirmed_tokens_total{drafter="stable",ReplicaId="a"} 40
# TYPE ray_paceline_draft_trials_total counter
ray_paceline_draft_trials_total{outcome="rolled_back",ReplicaId="a"} 1
# TYPE ray_paceline_draft_trial_running gauge
ray_paceline_draft_trial_running{ReplicaId="a"} 1
ray_paceline_draft_trial_running{ReplicaId="b"} 1
"""


def test_drafters_are_told_by_what_the_text_confirmed():
    assert _drafters(snapshot(TRIAL)) == {
        "rounds (candidate)": 10,
        "confirmed a round (candidate)": 0.0,
        "rounds (stable)": 80,
        "confirmed a round (stable)": 0.5,
        "candidates rolled back": 1,
        "replicas with a candidate": 2,
    }
    assert _drafters(snapshot("")) == {}


SCALING = """
# TYPE ray_paceline_autoscaling_replicas gauge
ray_paceline_autoscaling_replicas{pool="target"} 3
ray_paceline_autoscaling_replicas{pool="draft"} 0
# TYPE ray_paceline_autoscaling_need_replicas gauge
ray_paceline_autoscaling_need_replicas{pool="target",cause="requests"} 2.5
ray_paceline_autoscaling_need_replicas{pool="target",cause="ttft"} 2.75
ray_paceline_autoscaling_need_replicas{pool="draft",cause="does_not_pay"} 0
"""


def test_pools_that_scale_tell_what_they_need_and_why():
    assert _autoscaling(snapshot(SCALING)) == {
        "draft": "0 (needs none)",
        "target": "3 (needs requests 2.50; ttft 2.75)",
    }
    assert _autoscaling(snapshot("")) == {}


PREFILL = """
# TYPE ray_paceline_prefill_prompts_total counter
ray_paceline_prefill_prompts_total{reason="sent",ReplicaId="a"} 3
ray_paceline_prefill_prompts_total{reason="sent",ReplicaId="b"} 1
ray_paceline_prefill_prompts_total{reason="short",ReplicaId="a"} 9
# TYPE ray_paceline_prefill_calls_total counter
ray_paceline_prefill_calls_total{outcome="loadable",ReplicaId="a"} 3
ray_paceline_prefill_calls_total{outcome="in_vain",ReplicaId="b"} 1
# TYPE ray_paceline_prefill_tokens_total counter
ray_paceline_prefill_tokens_total{ReplicaId="a"} 4096
# TYPE ray_paceline_prefill_seconds histogram
ray_paceline_prefill_seconds_bucket{outcome="loadable",le="+Inf",ReplicaId="a"} 4
ray_paceline_prefill_seconds_count{outcome="loadable",ReplicaId="a"} 4
ray_paceline_prefill_seconds_sum{outcome="loadable",ReplicaId="a"} 6.0
"""


def test_a_prefill_pool_is_told_by_what_it_was_asked_and_what_came_of_it():
    assert _prefill(snapshot(PREFILL)) == {
        "sent": 4,
        "short": 9,
        "outcome in vain": 1,
        "outcome loadable": 3,
        "tokens computed for targets": 4096,
        "seconds waited (mean)": 1.5,
    }
    assert _prefill(snapshot("")) == {}
