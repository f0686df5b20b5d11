"""Snapshots in, a Prometheus page out."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest

from deployments.draft_metrics import DraftMetrics
from deployments.engine.speculation.draft_stats import DraftServerStats
from deployments.engine.speculation.speculator_stats import SpeculatorStats
from deployments.engine.types import EngineStats, SpeculationStats
from deployments.target_metrics import TargetMetrics
from kv_store.page_store import PageStoreStats, TierStats
from tests.fakes_metrics import exporter_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.fakes_metrics import Exporter


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    return exporter_for(monkeypatch)


def test_a_target_reports_its_links(exporter: Exporter) -> None:
    target = TargetMetrics()
    stats = SpeculatorStats(
        num_tables=50,
        num_late_tables=4,
        num_pool_draft_tokens=70,
        num_local_draft_tokens=30,
        num_withheld_draft_tokens=20,
        num_yielded_draft_tokens=8,
        num_targets_met=40,
        num_targets_missed=6,
        num_links_lost=2,
        num_links_up=3,
        num_pool_sessions=9,
        round_trip_p50_s=0.25,
        stall_p50_s=0.002,
    )
    expected = {
        ("draft_tokens_total", "pool"): 70,
        ("draft_tokens_total", "local"): 30,
        ("withheld_draft_tokens_total", "cost"): 12,
        ("withheld_draft_tokens_total", "target"): 8,
        ("tpot_target_steps_total", "met"): 40,
        ("tpot_target_steps_total", "missed"): 6,
        ("outcome_tables_total", "in_time"): 46,
        ("outcome_tables_total", "late"): 4,
        ("speculator_events_total", "link_lost"): 2,
        ("draft_links",): 3,
        ("draft_linked_sessions",): 9,
        ("draft_round_trip_seconds",): 0.25,
        ("speculation_stall_seconds",): 0.002,
    }
    for _ in range(2):
        target.speculator(stats)
        assert exporter.scrape() == expected
    target.speculator(replace(stats, num_links_lost=5, num_links_up=0, num_malformed=1))
    expected[("speculator_events_total", "link_lost")] = 5
    expected[("speculator_events_total", "malformed")] = 1
    del expected[("draft_links",)]
    assert exporter.scrape() == expected


def test_a_target_reports_its_engine_and_its_tiers(exporter: Exporter) -> None:
    target = TargetMetrics()
    spec = SpeculationStats(
        num_spec_steps=5,
        num_accepted_draft_tokens=9,
        num_accepted_pool_tokens=6,
        num_accepted_head_tokens=1,
        num_table_hits=4,
        num_table_misses=3,
    )
    target.engine(EngineStats(num_total_pages=8, num_free_pages=2, num_steps=7, speculation=spec))
    tier = TierStats(name="ssd", num_hits=11, num_errors=1, num_promoted=5, num_demoted=2)
    target.page_store(
        PageStoreStats(
            num_queued=3,
            num_dropped=2,
            num_failed=4,
            num_loads_refused=6,
            num_moves_dropped=8,
            tiers={"ssd": tier},
        )
    )
    assert exporter.scrape() == {
        ("spec_steps_total",): 5,
        ("accepted_draft_tokens_total", "pool"): 6,
        ("accepted_draft_tokens_total", "head"): 1,
        ("accepted_draft_tokens_total", "local"): 2,
        ("outcome_table_lookups_total", "hit"): 4,
        ("outcome_table_lookups_total", "miss"): 3,
        ("engine_steps_total",): 7,
        ("kv_pages", "free"): 2,
        ("kv_pages", "used"): 6,
        ("kv_write_queue_pages",): 3,
        ("kv_loads_refused_total",): 6,
        ("kv_tier_pages_total", "dropped", "all"): 2,
        ("kv_tier_pages_total", "failed", "all"): 4,
        ("kv_tier_pages_total", "hit", "ssd"): 11,
        ("kv_tier_pages_total", "error", "ssd"): 1,
        ("kv_tier_pages_total", "promoted", "ssd"): 5,
        ("kv_tier_pages_total", "demoted", "ssd"): 2,
        ("kv_tier_pages_total", "move_dropped", "all"): 8,
    }


def test_a_draft_replica_reports_its_sessions(exporter: Exporter) -> None:
    draft = DraftMetrics()
    stats = DraftServerStats(
        num_streams=2,
        num_sessions=5,
        num_pending=1,
        num_tables=40,
        num_rows=120,
        num_batches=20,
        num_drafter_failures=1,
        num_dropped_by_reason=Counter(evicted=3, too_long=1),
        num_scored_by_role=Counter(stable=30, candidate=5),
        num_confirmed_by_role=Counter(stable=12, candidate=4),
        batch_time_ewma_s=0.5,
    )
    for _ in range(2):
        draft.server(stats)
    draft.server(replace(stats, num_tables=41, num_dropped_by_reason=Counter(evicted=4)))
    assert exporter.scrape() == {
        ("draft_server_streams",): 2,
        ("draft_server_sessions",): 5,
        ("draft_server_pending_sessions",): 1,
        ("draft_server_batch_seconds",): 0.5,
        ("draft_server_batches_total",): 20,
        ("draft_server_tables_total",): 41,
        ("draft_server_rows_total",): 120,
        ("draft_server_events_total", "drafter_failed"): 1,
        ("draft_server_dropped_sessions_total", "evicted"): 4,
        ("draft_server_dropped_sessions_total", "too_long"): 1,
        ("draft_scored_rounds_total", "stable"): 30,
        ("draft_scored_rounds_total", "candidate"): 5,
        ("draft_confirmed_tokens_total", "stable"): 12,
        ("draft_confirmed_tokens_total", "candidate"): 4,
    }


_LABELLED: dict[str, Any] = {
    "num_dropped_by_reason": Counter(evicted=7),
    "num_scored_by_role": Counter(candidate=7),
    "num_confirmed_by_role": Counter(candidate=7),
}

REPORTED_ELSEWHERE = {
    # By the engine, per request, with what was cut off behind a stop.
    "num_rounds",
    "num_table_hits",
    "num_table_misses",
    "num_pool_accepted_tokens",
    "num_local_accepted_tokens",
    "num_head_accepted_tokens",
    # By the draft replicas themselves.
    "num_pool_pending",
    "pool_batch_time_s",
    # By the tiers, as hits and puts.
    "num_loaded",
    "num_saved",
    "tiers",
}


@pytest.mark.parametrize(
    ("stats_type", "report"),
    [
        (SpeculatorStats, lambda stats: TargetMetrics().speculator(stats)),
        (PageStoreStats, lambda stats: TargetMetrics().page_store(stats)),
        (DraftServerStats, lambda stats: DraftMetrics().server(stats)),
    ],
)
def test_no_number_of_a_snapshot_is_lost(
    stats_type: type[Any], report: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unseen = set()
    for field in fields(stats_type):
        exporter = exporter_for(monkeypatch)
        value = _LABELLED.get(field.name, 7)
        if field.name not in REPORTED_ELSEWHERE:
            report(stats_type(**{field.name: value}))
            if 7.0 not in exporter.scrape().values():
                unseen.add(field.name)
    assert unseen == set()
