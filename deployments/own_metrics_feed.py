"""An engine's own metrics on the endpoint of all others; called every few seconds."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from deployments.metrics import Metric, TotalFeed, new_counter, new_gauge

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ray.serve import metrics

    from deployments.engine.own_metrics import Sample

logger = logging.getLogger(__name__)

_DESCRIPTION = "The engine's own; see its documentation."
_MAX_SERIES = 4096


class OwnMetricsFeed:
    """Hands on what comes, by the engine's names and labels; new ones are dropped at a bound."""

    def __init__(self, max_series: int = _MAX_SERIES) -> None:
        """Start empty."""
        self._max_series = max_series
        self._labels: dict[str, tuple[str, ...]] = {}
        self._counters: dict[str, metrics.Counter] = {}
        self._gauges: dict[str, metrics.Gauge] = {}
        self._totals: dict[tuple[str, tuple[tuple[str, str], ...]], TotalFeed] = {}
        self._is_full = False
        self._known: set[tuple[str, tuple[tuple[str, str], ...]]] = set()

    def update(self, samples: Iterable[Sample]) -> None:
        """Report a snapshot."""
        for sample in samples:
            series = (sample.name, sample.labels)
            if series not in self._known and not self._may_begin(sample):
                continue
            if sample.is_total:
                self._total(sample).update(sample.value)
            else:
                self._gauge(sample).set(sample.value, tags=dict(sample.labels))

    def _may_begin(self, sample: Sample) -> bool:
        """Whether a series is taken; a name keeps the label names that it came with first."""
        names = tuple(name for name, _ in sample.labels)
        if self._labels.setdefault(sample.name, names) != names:
            return False
        if len(self._known) >= self._max_series:
            if not self._is_full:
                logger.warning("of the engine's own metrics only %d are reported", self._max_series)
            self._is_full = True
            return False
        self._known.add((sample.name, sample.labels))
        return True

    def _total(self, sample: Sample) -> TotalFeed:
        series = (sample.name, sample.labels)
        if series not in self._totals:
            if sample.name not in self._counters:
                self._counters[sample.name] = new_counter(self._metric(sample))
            self._totals[series] = TotalFeed(self._counters[sample.name], dict(sample.labels))
        return self._totals[series]

    def _gauge(self, sample: Sample) -> metrics.Gauge:
        if sample.name not in self._gauges:
            self._gauges[sample.name] = new_gauge(self._metric(sample))
        return self._gauges[sample.name]

    def _metric(self, sample: Sample) -> Metric:
        return Metric(sample.name, _DESCRIPTION, self._labels[sample.name])
