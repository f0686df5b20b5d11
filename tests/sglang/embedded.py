"""The embedded engine's text of the same requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from deployments.engine.config import EngineConfig, SpeculationConfig
from deployments.engine.factory import build_engine
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.weights.loader import default_cache_dir

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.engine.types import GenerationRequest
    from deployments.tokenizer import Tokenizer


async def by_the_embedded_engine(
    requests: list[GenerationRequest], folder: Path, tokenizer: Tokenizer
) -> dict[str, list[int]]:
    engine = build_engine(
        EngineConfig(model=str(folder), speculation=SpeculationConfig(enabled=False)),
        cache_dir=default_cache_dir(),
        page_store_factory=None,
        speculator=NoSpeculation(),
        detokenize=tokenizer.decode,
    )
    try:

        async def one(request: GenerationRequest) -> list[int]:
            return [token async for delta in engine.generate(request) for token in delta.token_ids]

        outputs = await asyncio.gather(*map(one, requests))
    finally:
        await engine.close()
    return {request.request_id: tokens for request, tokens in zip(requests, outputs, strict=True)}
