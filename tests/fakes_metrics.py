"""Ray's metric classes without Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

from deployments import metrics

if TYPE_CHECKING:
    import pytest

Scrape = dict[tuple[str, ...], float]


class Exporter:
    """Ray's metric classes on a registry of this process; unknown labels are refused, as Ray does.

    The real ones only export from inside a cluster.
    """

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()

    def counter(self, name: str, description: str, labels: tuple[str, ...]) -> SimpleNamespace:
        metric = prometheus_client.Counter(name, description, labels, registry=self._registry)

        def inc(value: float = 1.0, tags: dict[str, str] | None = None) -> None:
            assert value > 0
            (metric.labels(**tags) if tags else metric).inc(value)

        return SimpleNamespace(inc=inc)

    def gauge(self, name: str, description: str, labels: tuple[str, ...]) -> SimpleNamespace:
        metric = prometheus_client.Gauge(name, description, labels, registry=self._registry)

        def set_(value: float, tags: dict[str, str] | None = None) -> None:
            (metric.labels(**tags) if tags else metric).set(value)

        return SimpleNamespace(set=set_)

    def histogram(
        self, name: str, description: str, boundaries: list[float], labels: tuple[str, ...]
    ) -> SimpleNamespace:
        metric = prometheus_client.Histogram(
            name, description, labels, registry=self._registry, buckets=boundaries
        )

        def observe(value: float, tags: dict[str, str] | None = None) -> None:
            (metric.labels(**tags) if tags else metric).observe(value)

        return SimpleNamespace(observe=observe)

    def scrape(self) -> Scrape:
        """What is not zero, by name without the prefix, then by the labels' values.

        The values are in the order of the labels' names.
        """
        text = prometheus_client.generate_latest(self._registry).decode()
        return {
            (sample.name.removeprefix("paceline_"), *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.value and not sample.name.endswith("_created")
        }


def exporter_for(monkeypatch: pytest.MonkeyPatch) -> Exporter:
    """Have metrics made from here on exported by a new exporter."""
    exporter = Exporter()
    classes = SimpleNamespace(
        Counter=exporter.counter, Gauge=exporter.gauge, Histogram=exporter.histogram
    )
    monkeypatch.setattr(metrics, "metrics", classes)
    return exporter
