"""A real ``Engine`` over a tiny deterministic language model: no weights, no torch.

Token i of the output depends on the prompt, the seed, the choice and every token before it, so a
resumed request gives the same text only if the whole transcript came along.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from deployments.engine.base import Embedder, Engine
from deployments.engine.embedding import Embedding, Pooling
from deployments.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    EngineOverloadedError,
    RequestRejectedError,
)
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.speculation.types import DraftSampling, SessionSpec
from deployments.engine.types import (
    EngineStats,
    FinishReason,
    GenerationUsage,
    SpeculationStats,
    TokenDelta,
    TokenLogprob,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from deployments.engine.embedding import EmbeddingRequest
    from deployments.engine.prefixes import Report
    from deployments.engine.speculation.speculator import Speculator
    from deployments.engine.types import GenerationRequest


class EchoEngine(Engine, Embedder):
    """Writes lower-case letters and spaces, one token per step."""

    def __init__(
        self,
        *,
        vocabulary: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        step_s: float = 0.0,
        max_model_len: int = 512,
        max_waiting: int = 64,
        speculator: Speculator | None = None,
    ) -> None:
        self._speculator = speculator or NoSpeculation()
        self._num_sessions = 0
        self._vocabulary = tuple(vocabulary)
        self._decode = decode
        self._step_s = step_s
        self._max_model_len = max_model_len
        self._max_waiting = max_waiting
        self._running: dict[str, GenerationRequest] = {}
        self._aborted: set[str] = set()
        self._num_output_tokens = 0
        self._is_draining = False
        self.is_dead = False
        self.held: Report = {}

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        if self.is_dead:
            raise EngineDeadError("the engine is dead")
        if self._is_draining:
            raise EngineDrainingError("the engine is draining")
        if len(self._running) >= self._max_waiting:
            raise EngineOverloadedError("the waiting queue is full", 2.0)
        if len(request.prompt_token_ids) >= self._max_model_len:
            raise RequestRejectedError("the prompt is too long", "prompt")
        self._running[request.request_id] = request
        self._num_sessions += 1
        session_id = self._num_sessions
        self._speculator.open(_session(session_id, request))
        try:
            async for delta in self._steps(request):
                yield delta
        finally:
            self._speculator.close(session_id)
            del self._running[request.request_id]
            self._aborted.discard(request.request_id)

    async def _steps(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        output = list(request.resumed_output_ids)
        sampling = request.sampling
        told: dict[str, Any] = {}
        if sampling.num_prompt_logprobs is not None and not output:
            prompt, num_top = request.prompt_token_ids, sampling.num_prompt_logprobs
            scored = (self.logprob(prompt[: i + 1], num_top) for i in range(1, len(prompt)))
            told = {"prompt_logprobs": (None, *scored)}
        if not sampling.max_tokens:
            yield self._last(request, (), output, FinishReason.LENGTH, None, **told)
            return
        while True:
            await asyncio.sleep(self._step_s)
            if request.deadline is not None and time.time() > request.deadline:
                raise DeadlineExceededError("the request's deadline passed")
            if self.is_dead:
                raise EngineDeadError("the engine has died")
            if request.request_id in self._aborted:
                yield self._last(request, (), output, FinishReason.ABORT, None)
                return
            token = self._next(request, output)
            output.append(token)
            self._num_output_tokens += 1
            if sampling.num_logprobs is not None:
                text = (*request.prompt_token_ids, *output)
                told["logprobs"] = (self.logprob(text, sampling.num_logprobs),)
            stop = self._stop_match(request, output)
            if stop is not None:
                yield self._last(request, (token,), output, FinishReason.STOP, stop, **told)
                return
            if len(output) >= sampling.max_tokens:
                yield self._last(request, (token,), output, FinishReason.LENGTH, None, **told)
                return
            yield TokenDelta(
                request_id=request.request_id,
                token_ids=(token,),
                choice_index=request.choice_index,
                **told,
            )
            told = {}

    def logprob(self, text: Sequence[int], num_top: int) -> TokenLogprob:
        """Of a text's last token; no distribution, but a function of all that comes before."""
        own = -(zlib.crc32(repr(tuple(text)).encode()) % 4096) / 512
        top = ((token, -1.0 - rank) for rank, token in enumerate(self._vocabulary[:num_top]))
        return TokenLogprob(text[-1], own, 1 + text[-1], tuple(top))

    def _next(self, request: GenerationRequest, output: list[int]) -> int:
        state = (
            request.prompt_token_ids,
            request.sampling.seed if request.sampling.temperature else 0,
            request.choice_index if request.sampling.temperature else 0,
            tuple(output),
        )
        return self._vocabulary[zlib.crc32(repr(state).encode()) % len(self._vocabulary)]

    def _stop_match(self, request: GenerationRequest, output: list[int]) -> str | int | None:
        if len(output) < request.sampling.min_tokens:
            return None
        if output[-1] in request.sampling.stop_token_ids:
            return output[-1]
        text, before = self._decode(output), self._decode(output[:-1])
        for stop in request.sampling.stop_strings:
            if text.count(stop) > before.count(stop):
                return stop
        return None

    def _last(
        self,
        request: GenerationRequest,
        token_ids: tuple[int, ...],
        output: list[int],
        reason: FinishReason,
        stop_match: str | int | None,
        **told: Any,
    ) -> TokenDelta:
        return TokenDelta(
            request_id=request.request_id,
            token_ids=token_ids,
            choice_index=request.choice_index,
            finish_reason=reason,
            stop_match=stop_match,
            usage=GenerationUsage(
                num_prompt_tokens=len(request.prompt_token_ids),
                num_output_tokens=len(output),
                num_cached_tokens=min(len(request.prompt_token_ids), 3),
                num_tier_cached_tokens=1,
            ),
            speculation=SpeculationStats(
                num_spec_steps=2,
                num_draft_tokens=6,
                num_accepted_draft_tokens=3,
                num_accepted_pool_tokens=2,
                num_table_hits=1,
                num_table_misses=1,
                acceptance_histogram=(0, 1, 1),
            )
            if request.speculation
            else SpeculationStats(),
            **told,
        )

    async def embed(self, request: EmbeddingRequest) -> Embedding:
        if self.is_dead:
            raise EngineDeadError("the engine is dead")
        await asyncio.sleep(self._step_s)
        ids = request.prompt_token_ids
        return Embedding(
            request_id=request.request_id,
            values=np.array([len(ids), ids[0], request.pooling is Pooling.LAST], dtype=np.float32),
            usage=GenerationUsage(num_prompt_tokens=len(ids), num_output_tokens=0),
        )

    def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_total_pages=10,
            num_free_pages=10 - min(10, len(self._running)),
            num_output_tokens=self._num_output_tokens,
        )

    def held_prefixes(self) -> Report:
        return self.held

    def check_health(self) -> None:
        if self.is_dead:
            raise EngineDeadError("the engine is dead")

    async def drain(self, timeout_s: float) -> None:
        self._is_draining = True
        deadline = time.monotonic() + timeout_s
        while self._running and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self.is_dead = True
        self._speculator.shutdown()


def _session(session_id: int, request: GenerationRequest) -> SessionSpec:
    return SessionSpec(
        session_id=session_id,
        request_id=request.request_id,
        tenant=request.tenant,
        token_ids=request.prompt_token_ids + request.resumed_output_ids,
        sampling=DraftSampling(seed=request.sampling.seed),
    )
