"""How many replicas a cluster has while load runs."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from cluster.errors import RequestError
from cluster.metrics_reader import MetricsSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


class PoolSizes:
    """Samples of the replicas of every deployment, from the cluster's Prometheus endpoint.

    Args:
        metrics_url: of Ray's metrics.
        seconds: tells the time of the run.
    """

    def __init__(self, metrics_url: str, seconds: Callable[[], float]) -> None:
        self._url = metrics_url
        self._seconds = seconds
        self.samples: list[dict[str, Any]] = []
        """Each with ``at_s`` and ``replicas`` by deployment; a failed scrape leaves none."""

    async def watch(self, every_s: float) -> None:
        """Take samples until cancelled."""
        while True:
            try:
                snapshot = await asyncio.to_thread(MetricsSnapshot.read, self._url)
            except RequestError as error:
                logger.warning("no sample of the pools: %s", error)
            else:
                healthy = snapshot.by_label("serve_deployment_replica_healthy", "deployment")
                counts = {name: int(count) for name, count in healthy.items()}
                self.samples.append({"at_s": self._seconds(), "replicas": counts})
            await asyncio.sleep(every_s)
