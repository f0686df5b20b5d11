from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.own_metrics import Sample
from deployments.own_metrics_feed import OwnMetricsFeed
from tests.fakes_metrics import exporter_for

if TYPE_CHECKING:
    import pytest


def gauge(name: str, value: float, **labels: str) -> Sample:
    return Sample(name, tuple(sorted(labels.items())), value, is_total=False)


def total(name: str, value: float, **labels: str) -> Sample:
    return Sample(name, tuple(sorted(labels.items())), value, is_total=True)


def test_figures_keep_their_names_and_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = exporter_for(monkeypatch)
    feed = OwnMetricsFeed()
    feed.update([gauge("running", 3.0, rank="0"), total("tokens_total", 5.0, a="x", b="y")])
    feed.update([gauge("running", 2.0, rank="0"), total("tokens_total", 9.0, a="x", b="y")])
    assert exporter.scrape() == {("running", "0"): 2.0, ("tokens_total", "x", "y"): 9.0}


def test_labels_that_a_name_did_not_begin_with_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exporter = exporter_for(monkeypatch)
    feed = OwnMetricsFeed()
    feed.update([gauge("running", 3.0, rank="0"), gauge("running", 4.0, other="1")])
    assert exporter.scrape() == {("running", "0"): 3.0}


def test_there_is_a_bound(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = exporter_for(monkeypatch)
    feed = OwnMetricsFeed(max_series=2)
    for _ in range(2):
        feed.update([gauge("running", 1.0, rank=str(rank)) for rank in range(4)])
    assert exporter.scrape() == {("running", "0"): 1.0, ("running", "1"): 1.0}
    assert caplog.text.count("only 2 are reported") == 1
