"""The embedded engine: ``python -m ... <dtype> <weights> <threads>``."""

from __future__ import annotations

import asyncio
import sys
import time
import tomllib
from pathlib import Path

import torch

from deployments.engine.config import SpeculationConfig, TorchEngineConfig
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.assembly import EngineParts, start_engine
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.weights.loader import default_cache_dir, load_model
from deployments.engine.types import GenerationRequest, SamplingParams
from tests.bench.engine.protocol import serve

_KV_TOKENS = 16_384


class PacelineEngine:
    """The whole engine, without speculation."""

    def __init__(self, dtype: str, weights: str, num_threads: int) -> None:
        config = TorchEngineConfig.model_validate(
            {
                "dtype": dtype,
                "weights": weights,
                "num_threads": num_threads,
                "max_model_len": 8192,
                "num_pages": _KV_TOKENS // 64,
                "max_num_seqs": 32,
                "max_batch_tokens": 1024,
                "speculation": SpeculationConfig(enabled=False),
            }
        )
        torch.set_num_threads(num_threads)
        loaded = load_model(
            config.model,
            dtype=config.dtype,
            cache_dir=default_cache_dir(),
            weights=config.weights,
        )
        memory = KVCache(loaded.config, config.num_pages, dtype=loaded.model.dtype)
        self._runner = ModelRunner(loaded.model, loaded.config, memory)
        self._runner.warm_up()
        self._engine = start_engine(
            config,
            EngineParts(
                runner=self._runner,
                memory=memory,
                layout=loaded.page_layout(),
                vocab_size=loaded.config.vocab_size,
                max_positions=loaded.config.max_positions,
                eos_token_ids=frozenset(),
                store=None,
                speculator=NoSpeculation(),
                detokenize=lambda _: "",
            ),
        )
        self._loop = asyncio.new_event_loop()
        self._num_requests = 0
        project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
        self.version = project["project"]["version"]

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> tuple[float, float]:
        """See ``protocol.Contestant``."""

        async def answer(prompt: list[int]) -> list[float]:
            self._num_requests += 1
            request = GenerationRequest(
                request_id=str(self._num_requests),
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(
                    max_tokens=num_new_tokens, seed=1, temperature=0, ignore_eos=True
                ),
            )
            return [time.perf_counter() async for _ in self._engine.generate(request)]

        async def answer_all() -> list[list[float]]:
            return await asyncio.gather(*map(answer, prompts))

        started = time.perf_counter()
        times = self._loop.run_until_complete(answer_all())
        first = max(each[0] for each in times)
        return first - started, (max(each[-1] for each in times) - first) / (num_new_tokens - 1)

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


if __name__ == "__main__":
    serve(lambda: PacelineEngine(sys.argv[1], sys.argv[2], int(sys.argv[3])))
