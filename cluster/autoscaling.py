"""Sizing of the pools by the requests in flight at their replicas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.config import AutoscaleConfig


def autoscaling_options(config: AutoscaleConfig) -> dict[str, Any]:
    """Ray Serve's ``autoscaling_config`` of one pool.

    A drafter's load is the number of sessions that target replicas hold at it: Serve counts a held
    slot as a request in flight, so the same rule sizes both pools.
    """
    return {
        "min_replicas": config.min_replicas,
        "initial_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": config.target_ongoing_requests,
        "upscale_delay_s": config.upscale_delay_s,
        "downscale_delay_s": config.downscale_delay_s,
        "look_back_period_s": config.look_back_s,
        # Serve averages what replicas pushed within the look-back; one sample would be no average.
        "metrics_interval_s": min(10.0, config.look_back_s / 3),
    }
