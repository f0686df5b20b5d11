"""The real ingress and target around an engine that has every answer at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import SecretStr
from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.pools import deployment_options, target_options
from deployments.ingress import IngressDeployment
from deployments.target import TargetReplica
from tests.bench.gateway.engine import LETTER, InstantEngine

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.config import ClusterConfig
    from deployments.engine.base import Engine
    from deployments.engine.config import EngineConfig
    from deployments.engine.speculation.speculator import Speculator
    from deployments.tokenizer import Tokenizer
    from kv_store.config import KVStoreConfig


class InstantTarget(TargetReplica):
    """A target replica that computes nothing."""

    def _build_engine(
        self,
        engine: EngineConfig,
        cache_dir: Path,
        kv: KVStoreConfig | None,
        speculator: Speculator,
        tokenizer: Tokenizer,
    ) -> Engine:
        del engine, cache_dir, kv, speculator
        return InstantEngine(tokenizer.encode(LETTER)[0])


def instant_app(config: ClusterConfig) -> serve.Application:
    """As ``cluster.app`` binds it, without drafts and pages."""
    target = (
        serve.deployment(InstantTarget, name="target")
        .options(
            **target_options(config),
            request_router_config=RequestRouterConfig(
                request_router_class="deployments.routing.PrefixAwareRouter"
            ),
        )
        .bind(
            None,
            engine=config.engine,
            cache_dir=config.cache_dir,
            kv=None,
            pool_secret=SecretStr(""),
            tracing=config.tracing,
        )
    )
    return IngressDeployment.options(**deployment_options(config.pools.ingress)).bind(
        target,
        engine=config.engine,
        cache_dir=config.cache_dir,
        config=config.ingress,
        auth=config.auth,
        tracing=config.tracing,
    )
