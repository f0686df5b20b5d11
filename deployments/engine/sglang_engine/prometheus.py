"""SGLang's Prometheus metrics, of all its processes.

Its processes write them into files of one folder, as prometheus_client does it for several
processes. The replica's actor may have loaded that library before the folder was there; then it
keeps its own part, SGLang's tokenizer, in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from deployments.engine.own_metrics import Sample

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from prometheus_client import Metric

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable of SGLang's processes."""
_PREFIX = "sglang:"
_TOTAL = "_total"
"""Ray ends the names of counters so. What histograms count goes as it is, and keeps its names."""


def read_metrics(folder: Path) -> list[Sample]:
    """A snapshot; ``sglang:x`` is called ``sglang_x``. Blocks for some milliseconds.

    Args:
        folder: that ``FOLDER`` named when SGLang was started.
    """
    collector = MultiProcessCollector(CollectorRegistry(), str(folder))  # type: ignore[no-untyped-call]
    samples = {(s.name, s.labels): s for s in _samples(REGISTRY.collect())}
    samples |= {(s.name, s.labels): s for s in _samples(collector.collect())}  # type: ignore[no-untyped-call]
    return list(samples.values())


def _samples(families: Iterable[Metric]) -> Iterable[Sample]:
    for family in families:
        if not family.name.startswith(_PREFIX):
            continue
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            yield Sample(
                name=sample.name.replace(":", "_"),
                labels=tuple(sorted(sample.labels.items())),
                value=sample.value,
                is_total=sample.name.endswith(_TOTAL),
            )
