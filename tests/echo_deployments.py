"""The real deployments around the small test engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import SecretStr
from ray import serve

from deployments.config import AuthConfig, DraftPoolConfig, IngressConfig, TracingConfig
from deployments.draft import DraftReplica
from deployments.engine.config import TorchEngineConfig
from deployments.engine.prefixes import report
from deployments.ingress import IngressDeployment
from deployments.model_files import context_length
from deployments.target import TargetReplica
from tests.fakes_echo_engine import EchoEngine

if TYPE_CHECKING:
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
            max_model_len=context_length(engine, Path(engine.model)),
            speculator=speculator,
        )

    async def where(self) -> tuple[str, int, int, int]:
        """Replica id, process id, running sequences, sequences that hold a draft replica."""
        num_attached = self._sessions.num_attached if self._sessions is not None else 0
        return self._replica_id, os.getpid(), self._engine.stats().num_running, num_attached

    async def kill_engine(self, replica_id: str) -> None:
        """Let the engine of one replica die, and its process live."""
        if replica_id == self._replica_id and isinstance(self._engine, EchoEngine):
            self._engine.is_dead = True

    async def hold(self, replica_id: str, names: list[int]) -> None:
        """Have one replica report these prefixes, and no others."""
        if replica_id == self._replica_id and isinstance(self._engine, EchoEngine):
            self._engine.held = report(names, is_complete=True)


class EchoDraft(DraftReplica):
    """A draft replica that tells its process."""

    async def where(self) -> tuple[int, int]:
        """Process id, sequences drafted for."""
        return os.getpid(), self._server.stats().num_sessions


def echo_app(
    folder: Path,
    *,
    num_targets: int = 2,
    ingress: IngressConfig | None = None,
    auth: AuthConfig | None = None,
    tracing: TracingConfig | None = None,
    num_drafts: int = 2,
) -> serve.Application:
    engine = TorchEngineConfig(model=str(folder), served_model_name=MODEL)
    tracing = tracing or TracingConfig()
    pool = DraftPoolConfig(drafter="suffix", secret=SecretStr("pool-secret"))
    draft = serve.deployment(
        EchoDraft,
        name="draft",
        num_replicas=num_drafts,
        max_ongoing_requests=64,
        health_check_period_s=1,
        ray_actor_options={"num_cpus": 0.1},
    ).bind(engine=engine, draft=pool, cache_dir=folder, tracing=tracing)
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
            "request_routing_stats_period_s": 0.5,
        },
    ).bind(
        draft,
        engine=engine,
        cache_dir=folder,
        kv=None,
        pool_secret=pool.secret,
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
