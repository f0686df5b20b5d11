"""What the ingress itself measured, against which both tools are held.

A tool's own processes take processor time from a server on the same machine, so two tools in turn
do not meet the same server. What each one saw over what the server says of the same requests is a
property of the tool alone.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cluster.metrics_reader import MetricsSnapshot
from deployments.metrics import INTER_TOKEN, REQUEST_DURATION, TTFT

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.metrics import Metric

_PATIENCE_S = 60.0
_PAUSE_S = 0.5
MEASURES = {
    "mean ms to the first text": TTFT,
    "mean ms to the last text": REQUEST_DURATION,
    "mean ms of a token behind the first": INTER_TOKEN,
}
"""What a client measures -> what the server calls it."""

Seen = dict[str, float]
"""By measure."""


def with_server_view(url: str, num_requests: int, run: Callable[[], Seen]) -> tuple[Seen, Seen]:
    """What a tool saw of its requests over HTTP, and what the server did.

    Args:
        url: of the cluster's metrics.
        num_requests: that the tool sends; nobody else may send any.
        run: sends them.

    Raises:
        RuntimeError: the server's figures do not come.
    """
    before = MetricsSnapshot.read(url)
    seen = run()
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        # Metrics leave a process every few seconds.
        after = MetricsSnapshot.read(url)
        counts = {name: _rise(before, after, metric, "count") for name, metric in MEASURES.items()}
        if min(counts.values()) >= num_requests:
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"of {num_requests} requests the server's metrics have {counts}")
        time.sleep(_PAUSE_S)
    return seen, {
        name: 1000 * _rise(before, after, metric, "sum") / counts[name]
        for name, metric in MEASURES.items()
    }


def _rise(before: MetricsSnapshot, after: MetricsSnapshot, metric: Metric, part: str) -> float:
    name = f"{metric.name}_{part}"
    return after.total(name, surface="http") - before.total(name, surface="http")
