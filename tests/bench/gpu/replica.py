"""One SGLang behind the engine seam, asked line by line. Runs in SGLang's Python.

``tests.bench.engine.protocol`` says how it is talked to.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from contextlib import aclosing
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from deployments.engine.config import EngineConfig
from deployments.engine.factory import build_engine
from deployments.engine.sglang_engine.draft_link import DraftLink, DraftSettings
from deployments.engine.sglang_engine.self_check import installed_version
from deployments.engine.speculation.handshake import Identity
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.engine.types import GenerationRequest, SamplingParams, SpeculationStats
from kv_store.config import KVStoreConfig
from tests.bench.engine.protocol import serve

_FLUSH_TIMEOUT_S = 60.0
_numbers = count()


class Replica:
    """Answers and when they came.

    Args:
        config: of the engine.
        identity: of the model, for the draft replica.
        secret: of the draft pool.
        endpoint: of a draft replica; None where none drafts.
        kv: the tier; None without.
    """

    def __init__(
        self,
        config: EngineConfig,
        identity: Identity,
        secret: str,
        endpoint: str | None,
        kv: KVStoreConfig | None,
    ) -> None:
        self.version = installed_version() or ""
        self._endpoint = endpoint
        self._link: DraftLink | None = None
        if endpoint is not None:
            settings = DraftSettings(config.speculation, identity, "bench", SecretStr(secret))
            self._link = DraftLink(settings, logging.getLogger(__name__).error)
        self._engine: Any = build_engine(
            config,
            cache_dir=default_cache_dir(),
            page_store_factory=None,
            speculator=self._link or NoSpeculation(),
            detokenize=lambda _: "",
            kv=kv,
        )
        # SGLang keeps the event loop of its first request.
        self._runner = asyncio.Runner()

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> dict[str, Any]:
        """Answer prompts together and greedily, never ending early.

        Returns:
            Seconds that all of it took, and per prompt: tokens, seconds to the first of them, steps
            that gave some, prompt tokens from the tier, draft tokens of ours verified and accepted.
        """
        return self._runner.run(self._generate(prompts, num_new_tokens))

    def device(self) -> str:
        """What it runs on."""
        import torch

        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

    def flush(self) -> bool:
        """Empty SGLang's own memories, the GPU's and the host's; not the tier.

        Returns:
            Whether it did; SGLang refuses while it copies pages.
        """
        gives_up_at = time.monotonic() + _FLUSH_TIMEOUT_S
        manager = self._engine._runtime._manager
        while not self._runner.run(manager.flush_cache()).success:
            if time.monotonic() > gives_up_at:
                return False
            time.sleep(0.05)
        return True

    def num_saved(self) -> int:
        """Pages that have reached the tier, some seconds old."""
        stats = self._engine.page_store_stats()
        return 0 if stats is None else int(stats.num_saved)

    def counters(self) -> dict[str, Any]:
        """The streams' counters; empty without a draft replica."""
        return {} if self._link is None else asdict(self._link.stats())

    def close(self) -> bool:
        """End SGLang's processes."""
        self._runner.run(self._engine.close())
        return True

    async def _generate(self, prompts: list[list[int]], num_new_tokens: int) -> dict[str, Any]:
        began = time.perf_counter()
        answers = await asyncio.gather(*(self._answer(p, num_new_tokens, began) for p in prompts))
        return {"took_s": time.perf_counter() - began, "answers": answers}

    async def _answer(self, prompt: list[int], num_new_tokens: int, began: float) -> dict[str, Any]:
        request = GenerationRequest(
            request_id=f"request-{next(_numbers)}",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=num_new_tokens, temperature=0.0, seed=0, ignore_eos=True
            ),
        )
        if self._link is not None and self._endpoint is not None:
            self._link.attach(request.request_id, self._endpoint)
        tokens: list[int] = []
        stats = SpeculationStats()
        first_s, num_first, num_steps, usage = 0.0, 0, 0, None
        try:
            async with aclosing(self._engine.generate(request)) as deltas:
                async for delta in deltas:
                    if delta.token_ids and not tokens:
                        first_s, num_first = time.perf_counter() - began, len(delta.token_ids)
                    elif delta.token_ids:
                        num_steps += 1
                    tokens += delta.token_ids
                    stats, usage = delta.speculation or stats, delta.usage or usage
        finally:
            if self._link is not None:
                self._link.detach(request.request_id)
        return {
            "token_ids": tokens,
            "first_s": first_s,
            "num_first": num_first,
            "num_steps": num_steps,
            "num_tier_cached": usage.num_tier_cached_tokens if usage is not None else 0,
            "num_drafted": stats.num_draft_tokens,
            "num_accepted": stats.num_accepted_draft_tokens,
        }


def main(told: dict[str, Any]) -> None:
    """Start SGLang and answer until stdin ends.

    Args:
        told: ``engine`` (settings), ``identity``, ``secret``, ``endpoint`` and ``kv``.
    """
    logging.basicConfig(level=logging.WARNING)
    kv = None if told["kv"] is None else KVStoreConfig.model_validate(told["kv"])
    config = EngineConfig.model_validate(told["engine"])
    identity = Identity(**told["identity"])

    def load() -> Any:
        """What can be asked of it differs from the engine benchmark's contestants."""
        return Replica(config, identity, told["secret"], told["endpoint"], kv)

    serve(load)
    # SGLang's threads would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
