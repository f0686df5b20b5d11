from __future__ import annotations

import inspect
from typing import Any

from cluster.app import build_application
from cluster.config import ClusterConfig, PoolConfig, PoolsConfig
from deployments.engine.config import TorchEngineConfig


def arguments(config: ClusterConfig) -> dict[str, dict[str, Any]]:
    """Of every deployment by name; they fit its replica.

    Serve would find out only when a replica starts.
    """
    seen: dict[str, dict[str, Any]] = {}
    applications = [build_application(config)]
    while applications:
        bound = applications.pop()._bound_deployment
        replica = bound.func_or_class
        inspect.signature(replica.__init__).bind(None, *bound.init_args, **bound.init_kwargs)
        seen[bound.name] = bound.init_kwargs
        applications += [arg for arg in bound.init_args if arg is not None]
    return seen


def test_every_deployment_gets_the_arguments_it_takes() -> None:
    config = ClusterConfig()
    seen = arguments(config)
    assert set(seen) == {"ingress", "target", "draft"}
    assert all(kwargs["tracing"] == config.tracing for kwargs in seen.values())


def test_a_prefill_replica_is_a_target_that_drafts_nothing_and_shares_its_pages() -> None:
    pools = PoolsConfig(target=PoolConfig(num_cpus=2), prefill=PoolConfig(num_cpus=3))
    config = ClusterConfig(pools=pools, engine=TorchEngineConfig(num_pages=99))
    seen = arguments(config)
    assert set(seen) == {"ingress", "target", "draft", "prefill"}
    target, prefill = seen["target"], seen["prefill"]
    assert target["prefill_config"] == config.prefill
    assert prefill["kv"] == target["kv"] == config.kv
    assert (target["engine"].num_threads, prefill["engine"].num_threads) == (2, 3)
    assert (target["engine"].takes_drafts, prefill["engine"].takes_drafts) == (True, False)
    same = {"speculation": target["engine"].speculation, "num_threads": 2}
    assert prefill["engine"].model_copy(update=same) == target["engine"]
