"""The real deployments around the small test engine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pydantic import SecretStr
from ray import serve

from deployments.config import AuthConfig, IngressConfig, TracingConfig
from deployments.engine.config import TorchEngineConfig
from deployments.ingress import IngressDeployment
from deployments.target import TargetReplica
from tests.fakes_echo_engine import EchoEngine

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.engine.base import Engine
    from deployments.engine.speculation.speculator import Speculator
    from deployments.tokenizer import Tokenizer
    from kv_store.config import KVStoreConfig

MODEL = "echo"
STEP_S = 0.02


class EchoTarget(TargetReplica):
    """A target replica that needs no weights."""

    def _build_engine(
        self,
        engine: TorchEngineConfig,
        cache_dir: Path,
        kv: KVStoreConfig | None,
        speculator: Speculator,
        tokenizer: Tokenizer,
    ) -> Engine:
        return EchoEngine(
            vocabulary=tokenizer.encode("abcdefghij klmnopqrs tuvwxyz "),
            decode=tokenizer.decode,
            step_s=STEP_S,
            max_model_len=engine.max_model_len,
        )

    async def where(self) -> tuple[str, int, int]:
        """Replica id, process id, running sequences."""
        return self._replica_id, os.getpid(), self._engine.stats().num_running


def echo_app(
    folder: Path,
    *,
    num_targets: int = 2,
    ingress: IngressConfig | None = None,
    auth: AuthConfig | None = None,
    tracing: TracingConfig | None = None,
    draft: serve.Application | None = None,
) -> serve.Application:
    engine = TorchEngineConfig(model=str(folder), served_model_name=MODEL, max_model_len=1024)
    tracing = tracing or TracingConfig()
    target = serve.deployment(
        EchoTarget,
        name="target",
        num_replicas=num_targets,
        max_ongoing_requests=32,
        graceful_shutdown_timeout_s=10,
        health_check_period_s=1,
        ray_actor_options={"num_cpus": 0.1},
        request_router_config={
            "request_router_class": "deployments.routing:PrefixAwareRouter",
        },
    ).bind(
        draft,
        engine=engine,
        cache_dir=folder,
        kv=None,
        pool_secret=SecretStr("pool-secret"),
        tracing=tracing,
    )
    return IngressDeployment.options(
        ray_actor_options={"num_cpus": 0.1}, graceful_shutdown_timeout_s=10
    ).bind(
        target,
        engine=engine,
        cache_dir=folder,
        config=ingress or IngressConfig(),
        auth=auth or AuthConfig(),
        tracing=tracing,
    )
