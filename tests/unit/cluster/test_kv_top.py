"""Two scrapes to what the tiers did between them."""

import io

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from cluster.commands.kv_top import _draw, _Sample
from cluster.kv_pages import NamespaceSum
from cluster.kv_top import activity
from cluster.kv_usage import SsdUsage, ValkeyUsage
from cluster.metrics_reader import MetricsSnapshot

SCRAPE = """
# TYPE ray_paceline_kv_tier_pages_total counter
ray_paceline_kv_tier_pages_total{{tier="valkey",event="hit",ReplicaId="a"}} {hits}
ray_paceline_kv_tier_pages_total{{tier="valkey",event="hit",ReplicaId="b"}} 10
ray_paceline_kv_tier_pages_total{{tier="valkey",event="miss",ReplicaId="a"}} {misses}
ray_paceline_kv_tier_pages_total{{tier="valkey",event="refused",ReplicaId="a"}} 4
ray_paceline_kv_tier_pages_total{{tier="peers",event="served",ReplicaId="a"}} {served}
ray_paceline_kv_tier_pages_total{{tier="all",event="dropped",ReplicaId="a"}} 3
# TYPE ray_paceline_kv_write_queue_pages gauge
ray_paceline_kv_write_queue_pages{{ReplicaId="a"}} 5
# TYPE ray_paceline_prompt_tokens_total counter
ray_paceline_prompt_tokens_total{{tenant="t",ReplicaId="a"}} {prompt}
# TYPE ray_paceline_cached_tokens_total counter
ray_paceline_cached_tokens_total{{tenant="t",source="tier",ReplicaId="a"}} {cached}
"""


def snapshot(**numbers):
    families = text_string_to_metric_families(SCRAPE.format(**numbers))
    return MetricsSnapshot([sample for family in families for sample in family.samples])


BEFORE = snapshot(hits=100, misses=10, served=0, prompt=1000, cached=0)
NOW = snapshot(hits=130, misses=20, served=8, prompt=2000, cached=250)


def test_the_first_look_is_at_everything():
    seen = activity(NOW)
    tiers = {tier.tier: tier for tier in seen.tiers}
    assert tiers.keys() == {"valkey", "peers"}
    assert (tiers["valkey"].hits, tiers["valkey"].misses) == (140, 20)
    assert tiers["valkey"].hit_rate == 140 / 160
    assert (tiers["valkey"].refused, tiers["peers"].served) == (4, 8)
    assert tiers["peers"].hit_rate is None
    assert (seen.seconds, seen.num_queued, seen.dropped) == (0, 5, 3)
    assert (seen.from_tier, seen.from_replica) == (250 / 2000, 0)


def test_later_ones_are_at_what_happened_since_per_second():
    seen = activity(NOW, BEFORE, 2.0)
    valkey = next(tier for tier in seen.tiers if tier.tier == "valkey")
    assert (valkey.hits, valkey.misses, valkey.refused) == (15, 5, 0)
    assert valkey.hit_rate == 0.75
    assert (seen.seconds, seen.dropped, seen.from_tier) == (2.0, 0, 0.25)


def test_a_replica_that_has_gone_takes_nothing_back():
    seen = activity(BEFORE, NOW, 2.0)
    assert all(tier.hits >= 0 and tier.hit_rate is None for tier in seen.tiers)
    assert seen.from_tier is None


def test_a_look_is_drawn_with_what_is_known():
    usages = [
        ValkeyUsage(
            address="10.0.0.1:6379",
            num_pages=7,
            used_bytes=3 << 20,
            max_bytes=0,
            num_evicted=2,
        ),
        SsdUsage(path="/pages", num_bytes=5 << 20, num_replicas=1),
    ]
    namespace = NamespaceSum(
        tier="valkey", where="10.0.0.1:6379", namespace="ab" * 16, num_pages=7, num_bytes=1 << 20
    )
    console = Console(record=True, width=160, file=io.StringIO())
    for seen in (activity(NOW), activity(NOW, BEFORE, 2.0), activity(BEFORE, NOW, 2.0)):
        console.print(_draw(_Sample(seen, usages, [namespace])))
    text = console.export_text()
    for part in ("since the start", "pages/s of 2.0 s", "75%", "88%", "10.0.0.1", "ab" * 16, "5.0"):
        assert part in text
