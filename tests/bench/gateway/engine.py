"""An engine that has every answer at once."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deployments.engine.base import Engine
from deployments.engine.types import (
    EngineStats,
    FinishReason,
    GenerationUsage,
    SpeculationStats,
    TokenDelta,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deployments.engine.types import GenerationRequest

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
