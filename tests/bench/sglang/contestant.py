"""One SGLang in one configuration, asked line by line. Runs in SGLang's Python.

``python -m tests.bench.sglang.contestant JSON``, see ``main``; ``tests.bench.engine.protocol`` says
how it is talked to.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from deployments.engine.config import EngineConfig
from deployments.engine.sglang_engine.draft_link import DraftLink, DraftSettings
from deployments.engine.sglang_engine.self_check import installed_version
from deployments.engine.sglang_engine.start import start_sglang_engine
from deployments.engine.speculation.handshake import Identity
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.types import GenerationRequest, SamplingParams, SpeculationStats
from tests.bench.engine.protocol import serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_REPORTS_AFTER_S = 2.5
"""The scheduler tells its counters once a second."""
_TENANT = "bench"
_numbers = count()


class SGLangContestant:
    """Greedy answers and when they came.

    Args:
        config: of the engine.
        identity: of the model, for the draft pool.
        secret: of the draft pool.
        endpoint: of a draft replica; None where the pool does not draft.
    """

    def __init__(
        self, config: EngineConfig, identity: Identity, secret: str, endpoint: str | None
    ) -> None:
        self.version = installed_version()
        self._endpoint = endpoint
        self._link: DraftLink | None = None
        if endpoint is not None:
            settings = DraftSettings(config.speculation, identity, "bench", SecretStr(secret))
            self._link = DraftLink(settings, _tell_lost)
        self._engine = start_sglang_engine(
            config,
            Path(config.model),
            detokenize=lambda _: "",
            speculator=self._link or NoSpeculation(),
        )
        # SGLang keeps the event loop of its first request.
        self._runner = asyncio.Runner()
        self._meta: dict[tuple[int, ...], dict[str, Any]] = {}
        self._keep_meta()

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> list[dict[str, Any]]:
        """Answer prompts together, never ending early.

        Returns:
            Per prompt the tokens, when the first and the last of them came (s), how many came
            first, in how many steps the others, and what drafts did: steps that had some, draft
            tokens that were verified, accepted, accepted from the pool.
        """
        return self._runner.run(self._generate(prompts, num_new_tokens))

    def counters(self) -> dict[str, Any]:
        """What the scheduler's end of the draft streams counted so far; empty without a pool."""
        if self._link is None:
            return {}
        time.sleep(_REPORTS_AFTER_S)
        return asdict(self._link.stats())

    def close(self) -> None:
        """End SGLang's processes."""
        self._runner.run(self._engine.close())

    async def _generate(self, prompts: list[list[int]], num_new_tokens: int) -> list[Any]:
        return await asyncio.gather(*(self._answer(prompt, num_new_tokens) for prompt in prompts))

    async def _answer(self, prompt: list[int], num_new_tokens: int) -> dict[str, Any]:
        request_id = f"request-{next(_numbers)}"
        request = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=num_new_tokens, temperature=0.0, seed=0, ignore_eos=True
            ),
            tenant=_TENANT,
        )
        if self._link is not None and self._endpoint is not None:
            self._link.attach(request_id, self._endpoint)
        tokens: list[int] = []
        stats = SpeculationStats()
        first_at, num_first, num_pieces = 0.0, 0, -1
        try:
            async for delta in self._engine.generate(request):
                if delta.token_ids:
                    tokens += delta.token_ids
                    num_pieces += 1
                    if not num_pieces:
                        first_at, num_first = time.perf_counter(), len(tokens)
                stats = delta.speculation or stats
        finally:
            if self._link is not None:
                self._link.detach(request_id)
        found = {
            "token_ids": tokens,
            "first_at": first_at,
            "last_at": time.perf_counter(),
            "num_first": num_first,
        }
        meta = self._meta.pop(tuple(prompt))
        # SGLang's counters count padding as drafts; where ours drafts, ours are right.
        num_steps = meta.get("spec_verify_ct") or num_pieces
        is_sglangs = self._link is None and "spec_verify_ct" in meta
        return found | {
            "num_steps": num_steps,
            "num_drafted_steps": num_steps if is_sglangs else stats.num_spec_steps,
            "num_drafted": (
                meta["spec_num_proposed_drafts"] if is_sglangs else stats.num_draft_tokens
            ),
            "num_accepted": (
                meta["spec_num_correct_drafts"] if is_sglangs else stats.num_accepted_draft_tokens
            ),
            "num_from_pool": stats.num_accepted_pool_tokens,
        }

    def _keep_meta(self) -> None:
        """Of what SGLang says of a generation, keep the last."""
        runtime = self._engine._runtime
        generate = runtime.generate

        async def kept(arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
            async for item in generate(arguments):
                self._meta[tuple(arguments["input_ids"])] = item["meta_info"]
                yield item

        runtime.generate = kept


def _tell_lost(endpoint: str) -> None:
    logging.getLogger(__name__).error("the draft stream to %s is lost", endpoint)


def main(told: dict[str, Any]) -> None:
    """Start SGLang and answer until told to close.

    Args:
        told: ``engine`` (settings), ``identity`` (of the model), ``secret`` and ``endpoint`` (of
            the draft pool; null: none drafts).
    """
    logging.basicConfig(level=logging.WARNING)
    config = EngineConfig.model_validate(told["engine"])
    identity = Identity(**told["identity"])
    serve(lambda: SGLangContestant(config, identity, told["secret"], told["endpoint"]))
    # SGLang's threads would keep the process.
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
