"""The flow of one embeddings call, the same for every surface: texts in, vectors out."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deployments.engine.embedding import EmbeddingRequest
from deployments.engine.types import GenerationUsage
from deployments.errors import ContextLengthError, RequestInvalidError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from deployments.config import IngressConfig
    from deployments.engine.embedding import Embedding
    from deployments.generation import CallContext, Generation
    from deployments.metrics import IngressMetrics
    from deployments.openai_api import EmbeddingCall
    from deployments.target_client import TargetClient

_AT_ONCE = 8
"""Texts of one call that are at the target pool together; the others wait here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingAnswer:
    """The vectors of one call, in the order of its texts.

    Attributes:
        vectors: [E] float32 each.
        replica_id: the target replica that embedded the first text.
    """

    request_id: str
    vectors: tuple[NDArray[np.float32], ...]
    usage: GenerationUsage
    replica_id: str


class Embeddings:
    """Turns texts into vectors."""

    def __init__(
        self,
        generation: Generation,
        target: TargetClient,
        config: IngressConfig,
        metrics: IngressMetrics,
        *,
        max_model_len: int,
    ) -> None:
        self._generation = generation
        self._target = target
        self._config = config
        self._metrics = metrics
        self._max_model_len = max_model_len

    async def embed(self, call: EmbeddingCall, context: CallContext) -> EmbeddingAnswer:
        """Embed every input, or none: the first failure ends the call.

        Raises:
            RequestInvalidError: there are too many inputs, or one is empty or too long.
            EngineError: from the engine.
            SurfaceError: no replica could serve the request.
        """
        if len(call.inputs) > self._config.max_embedding_inputs:
            raise RequestInvalidError(
                f"At most {self._config.max_embedding_inputs} inputs per request.", call.param
            )
        request_id = uuid.uuid4().hex
        requests = [
            EmbeddingRequest(
                request_id=f"{request_id}-{index}",
                prompt_token_ids=await self._encode(item, call.param),
                pooling=call.pooling,
                normalize=call.normalize,
                tenant=context.tenant.name,
                tenant_key=context.tenant.tenant_key,
                priority=context.tenant.priority,
                deadline=context.deadline,
                traceparent=context.traceparent,
                avoid_replicas=context.avoid_replicas,
            )
            for index, item in enumerate(call.inputs)
        ]
        observer = self._metrics.observe(context.surface, context.tenant.name)
        try:
            embeddings = await self._embed_all(requests)
            usage = _sum_usage(embeddings)
            observer.finished(usage)
        except Exception:
            observer.failed()
            raise
        finally:
            observer.close()
        return EmbeddingAnswer(
            request_id=request_id,
            vectors=tuple(embedding.values for embedding in embeddings),
            usage=usage,
            replica_id=embeddings[0].replica_id,
        )

    async def _encode(self, item: str | Sequence[int], param: str) -> tuple[int, ...]:
        if isinstance(item, str):
            token_ids = await self._generation.encode_text(item, param)
        else:
            token_ids = self._generation.check_token_ids(item, param)
        if len(token_ids) > self._max_model_len:
            raise ContextLengthError(
                f"This model's maximum context length is {self._max_model_len} tokens. "
                f"However, an input has {len(token_ids)} tokens.",
                param,
            )
        return token_ids

    async def _embed_all(self, requests: Sequence[EmbeddingRequest]) -> list[Embedding]:
        places = asyncio.Semaphore(_AT_ONCE)

        async def embed(request: EmbeddingRequest) -> Embedding:
            async with places:
                return await self._target.embed(request)

        tasks = [asyncio.create_task(embed(request)) for request in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _sum_usage(embeddings: Sequence[Embedding]) -> GenerationUsage:
    usages = [embedding.usage for embedding in embeddings]
    return GenerationUsage(
        num_prompt_tokens=sum(usage.num_prompt_tokens for usage in usages),
        num_output_tokens=0,
        num_cached_tokens=sum(usage.num_cached_tokens for usage in usages),
        num_tier_cached_tokens=sum(usage.num_tier_cached_tokens for usage in usages),
    )
