"""What Ray Serve is told of pools that grow and shrink by their load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cluster.config import ClusterConfig
    from cluster.scaling.config import AutoscaleConfig

POLICY = "cluster.scaling.serve_policy:JointPolicy"
_MAX_PUSH_INTERVAL_S = 10.0


def autoscaling_options(config: AutoscaleConfig) -> dict[str, Any]:
    """Ray Serve's ``autoscaling_config`` of one pool.

    Delays are the policy's business. Nothing is said of initial replicas, because Serve would go
    back to them at every rolling update.
    """
    return {
        "min_replicas": config.min_replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": config.target_ongoing_requests,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
        "look_back_period_s": config.look_back_s,
        # Replicas tell what they kept within the look-back; one sample would be no average.
        "metrics_interval_s": min(_MAX_PUSH_INTERVAL_S, config.look_back_s / 3),
    }


def application_policy(config: ClusterConfig) -> dict[str, Any] | None:
    """The application's ``autoscaling_policy``; None where no pool grows or shrinks.

    Ray Serve takes it in a config file alone, not from an application that is built in code.
    """
    scaled = {
        name: pool.autoscaling.model_dump(mode="json", exclude_unset=True)
        for name, pool in config.pools.by_name.items()
        if pool.autoscaling is not None
    }
    if not scaled:
        return None
    scaling = config.scaling.model_dump(mode="json", exclude_unset=True)
    return {"policy_function": POLICY, "policy_kwargs": {"pools": scaled, "scaling": scaling}}
