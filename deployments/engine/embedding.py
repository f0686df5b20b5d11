"""Embeddings: a prompt's final hidden states as one vector.

An embedding is a generation that stops before its first token and asks for the hidden states behind
the final norm, so it shares queues, steps and pages with every other request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from deployments.engine.errors import EngineError, InvalidLogitsError
from deployments.engine.types import (
    FINAL_NORM,
    CaptureSpec,
    FinishReason,
    GenerationRequest,
    GenerationUsage,
    SamplingParams,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from numpy.typing import NDArray

    from deployments.engine.types import TokenDelta


class Pooling(StrEnum):
    """How a prompt's rows become one."""

    MEAN = "mean"
    """Their mean. All rows are computed, so cached pages cannot be used."""
    LAST = "last"
    """The last one, which has seen all tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """One text to embed. Attributes without a line here are those of ``GenerationRequest``.

    Attributes:
        normalize: scale the vector to length 1.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    pooling: Pooling = Pooling.MEAN
    normalize: bool = True
    tenant: str = "default"
    tenant_key: bytes = field(default=bytes(32), repr=False)
    priority: int = 0
    deadline: float | None = None
    traceparent: str | None = None
    avoid_replicas: tuple[str, ...] = ()

    def as_generation(self) -> GenerationRequest:
        """The generation whose hidden states the vector is made of."""
        return GenerationRequest(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            sampling=SamplingParams(max_tokens=0, seed=0, temperature=0.0),
            capture=CaptureSpec(layers=(FINAL_NORM,), includes_prompt=self.pooling is Pooling.MEAN),
            tenant=self.tenant,
            tenant_key=self.tenant_key,
            priority=self.priority,
            deadline=self.deadline,
            traceparent=self.traceparent,
            speculation=False,
            avoid_replicas=self.avoid_replicas,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """One embedded text.

    Attributes:
        values: [E] float32, E the model's hidden size.
        replica_id: who computed it; set by the target deployment.
    """

    request_id: str
    values: NDArray[np.float32]
    usage: GenerationUsage
    replica_id: str = ""


async def pooled(request: EmbeddingRequest, deltas: AsyncIterator[TokenDelta]) -> Embedding:
    """Read the deltas of ``request.as_generation()`` to their end.

    Raises:
        EngineError: the request failed or was aborted.
    """
    usage = GenerationUsage(num_prompt_tokens=0, num_output_tokens=0)
    total, num_rows = np.zeros(1), 0
    async for delta in deltas:
        if delta.hidden_states is not None:
            rows = delta.hidden_states.values[0]
            total = total + rows.sum(axis=0, dtype=np.float64)
            num_rows += rows.shape[0]
        if delta.finish_reason is FinishReason.ABORT:
            raise EngineError("The request was aborted.")
        usage = delta.usage or usage
    mean = total / num_rows
    if not np.isfinite(mean).all():
        raise InvalidLogitsError("The model gave hidden states that are not numbers.")
    if request.normalize:
        mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
    return Embedding(
        request_id=request.request_id,
        values=mean.astype(np.float32),
        usage=usage,
    )
