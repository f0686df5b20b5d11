"""Decisions as metrics and log lines; ``paceline status`` reads the metrics."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from deployments import metrics

if TYPE_CHECKING:
    from cluster.scaling.policy import Decision

logger = logging.getLogger("ray.serve")


class Explanations:
    """What was told of each pool; a pool is told about again when anything but numbers changes."""

    def __init__(self) -> None:
        self._replicas = metrics.new_gauge(metrics.SCALING_REPLICAS)
        self._needs = metrics.new_gauge(metrics.SCALING_NEEDS)
        self._decisions = metrics.new_counter(metrics.SCALING_DECISIONS)
        self._told: dict[str, str] = {}
        self._causes: dict[str, set[str]] = {}

    def tell(self, decision: Decision) -> None:
        """Report a decision; log it if pool or cause are new, or replicas come or go."""
        pool = decision.pool
        self._replicas.set(decision.num_replicas, tags={"pool": pool})
        # A cause that is gone would stay with its last value.
        causes = self._causes.setdefault(pool, set())
        causes |= decision.needs.keys()
        for cause in causes:
            need = decision.needs.get(cause, 0.0)
            self._needs.set(need, tags={"pool": pool, "cause": cause})
        change = decision.num_replicas - decision.before
        direction = "up" if change > 0 else "down" if change < 0 else "keep"
        tags = {"pool": pool, "cause": decision.cause, "direction": direction}
        self._decisions.inc(tags=tags)
        if change or self._told.get(pool) != decision.cause:
            logger.info("autoscaling: %s: %s (%s)", pool, decision.reason, decision.cause)
        self._told[pool] = decision.cause
