"""The real ingress and target around an engine that has every answer at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pydantic import SecretStr
from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.pools import deployment_options, target_options
from deployments.engine.base import Engine
from deployments.engine.types import (
    EngineStats,
    FinishReason,
    GenerationUsage,
    SpeculationStats,
    TokenDelta,
)
from deployments.ingress import IngressDeployment
from deployments.target import TargetReplica

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cluster.config import ClusterConfig
    from deployments.engine.config import EngineConfig
    from deployments.engine.speculation.speculator import Speculator
    from deployments.engine.types import GenerationRequest
    from deployments.tokenizer import Tokenizer
    from kv_store.config import KVStoreConfig

LETTER = "a"
"""What every answer consists of."""


class InstantEngine(Engine):
    """One token per step, and steps that take no time: what is left is the way to it.

    Args:
        token_id: all that it ever says.
    """

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """See ``Engine``."""
        last = request.sampling.max_tokens - 1
        for number in range(last + 1):
            # As between two steps of an engine with a thread of its own.
            await asyncio.sleep(0)
            if number < last:
                yield TokenDelta(
                    request_id=request.request_id,
                    token_ids=(self._token_id,),
                    choice_index=request.choice_index,
                )
        yield TokenDelta(
            request_id=request.request_id,
            token_ids=(self._token_id,),
            choice_index=request.choice_index,
            finish_reason=FinishReason.LENGTH,
            usage=GenerationUsage(
                num_prompt_tokens=len(request.prompt_token_ids), num_output_tokens=last + 1
            ),
            speculation=SpeculationStats(),
        )

    def abort(self, request_id: str) -> None:
        """See ``Engine``; nothing runs long enough."""

    def stats(self) -> EngineStats:
        """See ``Engine``."""
        return EngineStats()

    def check_health(self) -> None:
        """See ``Engine``."""

    async def drain(self, timeout_s: float) -> None:
        """See ``Engine``."""

    async def close(self) -> None:
        """See ``Engine``."""


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
