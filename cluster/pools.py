"""From pool settings to what Ray is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.autoscaling import autoscaling_options
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from cluster.config import ClusterConfig, PoolConfig, PoolsConfig

HEALTH_CHECK_PERIOD_S = 5.0
HEALTH_CHECK_TIMEOUT_S = 10.0
# HAProxy managers, Serve's controller and proxies ask for no CPU; this is room for Serve's tasks.
_SPARE_CPUS = 1.0


@dataclass(frozen=True, slots=True)
class MachineResources:
    """What one machine must offer Ray so that every pool fits at its largest.

    Attributes:
        num_cpus: logical CPUs; may exceed the real ones, replicas then share them.
        resources: custom Ray resources.
        labels: of the only node.
    """

    num_cpus: int
    resources: dict[str, int]
    labels: dict[str, str]


def deployment_options(pool: PoolConfig) -> dict[str, Any]:
    """Keyword arguments for ``Deployment.options`` of one pool."""
    actor_options: dict[str, Any] = {"num_cpus": pool.num_cpus, "num_gpus": pool.num_gpus}
    if pool.resources:
        actor_options["resources"] = dict(pool.resources)
    if pool.labels:
        actor_options["label_selector"] = dict(pool.labels)
    options: dict[str, Any] = {
        "ray_actor_options": actor_options,
        "max_ongoing_requests": pool.max_ongoing_requests,
        "max_queued_requests": pool.max_queued_requests,
        "max_surge_percent": pool.max_surge_percent,
        "graceful_shutdown_timeout_s": pool.shutdown_timeout_s,
        # Replicas drain by themselves; Serve only has to look often enough to notice the end.
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
    }
    if pool.autoscaling is None:
        options["num_replicas"] = pool.replicas
    else:
        options["autoscaling_config"] = autoscaling_options(pool.autoscaling)
    return options


def target_options(config: ClusterConfig) -> dict[str, Any]:
    """Keyword arguments for ``Deployment.options`` of the target pool.

    Its replicas may run in another Python environment than the rest of the cluster. Several GPUs
    of one replica are reserved together, on one machine, as a placement group.
    """
    options = deployment_options(config.pools.target)
    if config.engine.sglang.tensor_parallel > 1:
        options |= _placement_group(config.pools.target)
        # What places the bundle places the actor.
        options["ray_actor_options"].pop("label_selector", None)
    if (python := config.engine.sglang.python) is not None:
        options["ray_actor_options"]["runtime_env"] = {"py_executable": str(python)}
    return options


def _placement_group(pool: PoolConfig) -> dict[str, Any]:
    """One bundle: the ranks are processes of the replica's actor, and Ray shows it its GPUs."""
    bundle = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
    options: dict[str, Any] = {
        "placement_group_bundles": [{name: some for name, some in bundle.items() if some}],
        "placement_group_strategy": "STRICT_PACK",
    }
    if pool.labels:
        options["placement_group_bundle_label_selector"] = [dict(pool.labels)]
    return options


def max_replicas(pool: PoolConfig) -> int:
    """Replicas the pool may grow to."""
    return pool.autoscaling.max_replicas if pool.autoscaling else pool.replicas


def engine_threads(config: ClusterConfig, pool: PoolConfig | None = None) -> int:
    """Threads of one replica of the target pool, or of another one that runs its engine.

    As set, or else the replica's share of the machine.
    """
    pool = pool or config.pools.target
    return config.engine.num_threads or max(1, math.floor(pool.num_cpus))


def machine_resources(pools: PoolsConfig) -> MachineResources:
    """What a single machine must claim to have.

    Raises:
        ConfigError: pools insist on different values of one label; that takes several machines.
    """
    num_cpus = _SPARE_CPUS
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    for name, pool in pools.by_name.items():
        replicas = max_replicas(pool)
        replicas += math.ceil(replicas * pool.max_surge_percent / 100)
        num_cpus += replicas * pool.num_cpus
        for resource, amount in pool.resources.items():
            resources[resource] = resources.get(resource, 0.0) + replicas * amount
        for label, value in pool.labels.items():
            if labels.setdefault(label, value) != value:
                raise ConfigError(
                    (f"pools.{name}.labels: one machine cannot have two values of {label!r}",)
                )
    # Ray refuses a node with a broken quantity above one.
    whole = {name: math.ceil(amount) for name, amount in resources.items()}
    return MachineResources(num_cpus=math.ceil(num_cpus), resources=whole, labels=labels)
