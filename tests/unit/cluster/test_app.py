from __future__ import annotations

import inspect

from cluster.app import build_application
from cluster.config import ClusterConfig


def test_every_deployment_gets_the_arguments_it_takes() -> None:
    """Serve would find out only when a replica starts."""
    config = ClusterConfig()
    seen: dict[str, dict[str, object]] = {}
    applications = [build_application(config)]
    while applications:
        bound = applications.pop()._bound_deployment
        replica = bound.func_or_class
        inspect.signature(replica.__init__).bind(None, *bound.init_args, **bound.init_kwargs)
        seen[bound.name] = bound.init_kwargs
        applications += [arg for arg in bound.init_args if arg is not None]
    assert set(seen) == {"ingress", "target", "draft"}
    assert all(kwargs["tracing"] == config.tracing for kwargs in seen.values())
