"""The embedded engine: ``python -m ... <its configuration as JSON>``."""

from __future__ import annotations

import asyncio
import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import torch

from deployments.engine.config import TorchEngineConfig
from deployments.engine.factory import build_engine
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.engine.types import GenerationRequest, SamplingParams
from tests.bench.engine.protocol import (
    KV_TOKENS,
    MAX_BATCH_TOKENS,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    Block,
    serve,
)


class PacelineEngine:
    """The whole engine, without speculation."""

    def __init__(self, settings: dict[str, Any]) -> None:
        config = TorchEngineConfig.model_validate(
            {
                "max_model_len": MAX_MODEL_LEN,
                "num_pages": KV_TOKENS // 64,
                "max_num_seqs": MAX_NUM_SEQS,
                "max_batch_tokens": MAX_BATCH_TOKENS,
                "speculation": {"enabled": False},
                **settings,
            }
        )
        self._engine: Any = build_engine(
            config,
            cache_dir=default_cache_dir(),
            page_store_factory=None,
            speculator=NoSpeculation(),
            detokenize=lambda _: "",
        )
        core = self._engine._core
        self._runner, self._memory = core._runner, core._memory
        self._loop = asyncio.new_event_loop()
        self._num_requests = 0
        project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
        self.version = project["project"]["version"]

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> tuple[float, float]:
        """See ``protocol.Contestant``."""

        async def answer_all() -> list[list[float]]:
            return await asyncio.gather(*(self._answer(each, num_new_tokens) for each in prompts))

        started = time.perf_counter()
        times = self._loop.run_until_complete(answer_all())
        first = max(each[0] for each in times)
        return first - started, (max(each[-1] for each in times) - first) / (num_new_tokens - 1)

    def arrivals(
        self, prompts: list[list[int]], interval_s: float, num_new_tokens: int
    ) -> list[float]:
        """See ``protocol.Contestant``."""

        async def answer_late(number: int, prompt: list[int]) -> float:
            due = started + number * interval_s
            await asyncio.sleep(due - time.perf_counter())
            return (await self._answer(prompt, num_new_tokens))[0] - due

        async def answer_all() -> list[float]:
            return await asyncio.gather(*(answer_late(*each) for each in enumerate(prompts)))

        started = time.perf_counter()
        return self._loop.run_until_complete(answer_all())

    def forward(self, context: int, num_tokens: int) -> float:
        """See ``protocol.Contestant``; rows of earlier requests are the context."""
        rows = torch.arange(context, context + num_tokens)
        span = SequenceSpan(start=0, length=num_tokens, kv_slots=torch.arange(context + num_tokens))
        batch = ForwardBatch(
            token_ids=rows, positions=rows, slots=rows, spans=(span,), logit_rows=rows - context
        )
        started = time.perf_counter()
        self._runner.forward(batch)
        return time.perf_counter() - started

    def kv_blocks(self) -> list[Block]:
        """See ``protocol.Contestant``."""
        return [Block(pool.data_ptr(), pool.nbytes) for pool in (self._memory.k, self._memory.v)]

    async def _answer(self, prompt: list[int], num_new_tokens: int) -> list[float]:
        self._num_requests += 1
        request = GenerationRequest(
            request_id=str(self._num_requests),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=num_new_tokens, seed=1, temperature=0, ignore_eos=True
            ),
        )
        return [time.perf_counter() async for _ in self._engine.generate(request)]


if __name__ == "__main__":
    serve(lambda: PacelineEngine(json.loads(sys.argv[1])))
