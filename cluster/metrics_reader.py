"""Reads the Prometheus endpoint of a running cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cluster.errors import RequestError

if TYPE_CHECKING:
    from prometheus_client.samples import Sample

_TIMEOUT_S = 5.0
_RAY_PREFIX = "ray_"


class MetricsSnapshot:
    """All samples of one scrape."""

    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    @classmethod
    def read(cls, url: str) -> MetricsSnapshot:
        """Scrape once.

        Raises:
            RequestError: the endpoint does not answer, or not in Prometheus' format.
        """
        try:
            text = httpx.get(url, timeout=_TIMEOUT_S).raise_for_status().text
            families = list(text_string_to_metric_families(text))
        except (httpx.HTTPError, ValueError) as error:
            raise RequestError(f"{url}: {error or type(error).__name__}") from error
        return cls([sample for family in families for sample in family.samples])

    def total(self, name: str, **labels: str) -> float:
        """The sum over all replicas of the samples that carry these labels.

        Args:
            name: as the code defines it; Ray's prefix is added.
            labels: those that must match.
        """
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == _RAY_PREFIX + name and labels.items() <= sample.labels.items()
        )

    def by_label(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Sums like ``total``, one for each value of ``label``."""
        values = {
            sample.labels[label]
            for sample in self._samples
            if sample.name == _RAY_PREFIX + name and label in sample.labels
        }
        return {value: self.total(name, **{label: value}, **labels) for value in sorted(values)}
