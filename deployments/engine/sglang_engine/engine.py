"""SGLang as an engine: what the seam promises, kept with what SGLang offers.

SGLang chooses tokens; where an output ends is decided here, by the rules of the embedded engine.
SGLang is told about stop tokens as well, so that it does not compute behind them; behind a stop
string it computes until the abort arrives.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deployments.engine.base import Engine
from deployments.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    RequestRejectedError,
)
from deployments.engine.sglang_engine.answers import read_answer, speculation_stats
from deployments.engine.sglang_engine.requests import generation_arguments, refuse_unsupported
from deployments.engine.stopping import StopCondition
from deployments.engine.types import (
    EngineStats,
    GenerationUsage,
    TokenDelta,
)
from deployments.engine.validation import validate_request
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from deployments.engine.own_metrics import Sample
    from deployments.engine.prefixes import Report
    from deployments.engine.sglang_engine.answers import Answer
    from deployments.engine.sglang_engine.draft_rounds import RoundCounts
    from deployments.engine.sglang_engine.runtime import Runtime
    from deployments.engine.speculation.speculator import Speculator
    from deployments.engine.types import GenerationRequest
    from deployments.engine.validation import ModelLimits
    from kv_store.page_store import PageStoreStats

logger = logging.getLogger(__name__)

_WATCH_PERIOD_S = 0.5
_HANGS_AFTER_S = 120.0
"""Without a token for anybody, while somebody waits for one."""


@dataclass(slots=True)
class _Running:
    """One request that SGLang works on.

    Attributes:
        rid: SGLang's name for it.
        wait: the bound on the answer that is waited for.
        num_preemptions: as SGLang told last.
        rounds: of verification, so far.
        has_told_prompt: whether the prompt's log probabilities are told; SGLang repeats them.
    """

    request: GenerationRequest
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)
    wait: asyncio.Timeout | None = None
    num_preemptions: int = 0
    rounds: Counter[RoundCounts] = field(default_factory=Counter)
    has_told_prompt: bool = False


class SGLangEngine(Engine):
    """Hands requests to SGLang and its tokens back."""

    def __init__(
        self,
        runtime: Runtime,
        limits: ModelLimits,
        *,
        detokenize: Callable[[Sequence[int]], str],
        speculator: Speculator,
    ) -> None:
        """Wrap a running SGLang.

        Args:
            runtime: closed with the engine.
            limits: of the model.
            detokenize: text of output tokens, for stop strings.
            speculator: shut down with the engine.
        """
        self._runtime = runtime
        self._limits = limits
        self._detokenize = detokenize
        self._speculator = speculator
        self._running: dict[str, _Running] = {}
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False
        self._is_closed = False
        self._death: EngineDeadError | None = None
        self._heard_at = time.monotonic()
        self._watching: asyncio.Task[None] | None = None
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_cached_tokens = 0
        self._num_tier_cached_tokens = 0
        self._num_preemptions = 0
        self._rounds: Counter[RoundCounts] = Counter()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See ``Engine.generate``; errors come with the first delta."""
        self._refuse_if_impossible(request)
        stop = self._stop_condition(request)
        running = self._open(request)
        arguments = generation_arguments(request, self._limits, running.rid)
        self._runtime.owner(arguments["cache_salt"], request.tenant)
        try:
            # Closing SGLang's generator before its end aborts the request there.
            async with aclosing(self._runtime.generate(arguments)) as items:
                while True:
                    item = await self._next(running, items)
                    answer = read_answer(item, request, with_prompt=not running.has_told_prompt)
                    delta = self._delta(running, answer, stop)
                    if delta.token_ids or delta.finish_reason is not None:
                        running.has_told_prompt |= delta.prompt_logprobs is not None
                        yield delta
                    if delta.finish_reason is not None:
                        return
        finally:
            self._close(running)

    def abort(self, request_id: str) -> None:
        """See ``Engine.abort``."""
        running = self._running.get(request_id)
        if running is not None:
            self._runtime.abort(running.rid)

    def stats(self) -> EngineStats:
        """See ``Engine.stats``; pages are counted in units of 64 tokens."""
        load = self._runtime.load()
        return EngineStats(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            num_total_pages=load.num_total_tokens // PAGE_TOKENS,
            num_free_pages=(load.num_total_tokens - load.num_used_tokens) // PAGE_TOKENS,
            num_preemptions=self._num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_local_cached_tokens=self._num_cached_tokens - self._num_tier_cached_tokens,
            num_tier_cached_tokens=self._num_tier_cached_tokens,
            speculation=speculation_stats(self._rounds),
        )

    def page_store_stats(self) -> PageStoreStats | None:
        """See ``SharesPages``."""
        return self._runtime.page_store_stats()

    def held_prefixes(self) -> Report:
        """See ``ReportsPrefixes``."""
        return self._runtime.held_prefixes()

    def own_metrics(self) -> Sequence[Sample]:
        """See ``HasOwnMetrics``: SGLang's."""
        return self._runtime.own_metrics()

    def check_health(self) -> None:
        """See ``Engine.check_health``."""
        if self._death is None and (name := self._runtime.dead_process()) is not None:
            self._death = EngineDeadError(f"SGLang's process {name} has ended.")
        if self._death is not None:
            raise self._death
        if self._running and time.monotonic() - self._heard_at > _HANGS_AFTER_S:
            raise EngineDeadError(f"SGLang has not said anything for {_HANGS_AFTER_S:.0f} s.")

    async def drain(self, timeout_s: float) -> None:
        """See ``Engine.drain``."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._is_idle.wait(), timeout_s)
        except TimeoutError:
            logger.warning("%d requests still run after the drain time", len(self._running))

    async def close(self) -> None:
        """See ``Engine.close``. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._watching is not None:
            self._watching.cancel()
        self._die(EngineDeadError("The engine has been closed."))
        await asyncio.to_thread(self._runtime.close)
        await asyncio.to_thread(self._speculator.shutdown)

    def _refuse_if_impossible(self, request: GenerationRequest) -> None:
        if self._death is not None:
            raise self._death
        if self._is_draining:
            raise EngineDrainingError("The engine is draining.")
        validate_request(request, self._limits)
        refuse_unsupported(request)
        if request.request_id in self._running:
            raise RequestRejectedError("A request with this id is running.", "request_id")
        if request.deadline is not None and time.time() >= request.deadline:
            raise DeadlineExceededError("The request's deadline has passed.")

    def _stop_condition(self, request: GenerationRequest) -> StopCondition:
        sampling = request.sampling
        stop = StopCondition(
            max_output_tokens=self._limits.max_output_tokens(request),
            min_tokens=sampling.min_tokens,
            stop_token_ids=self._limits.stop_token_ids(request),
            stop_strings=sampling.stop_strings,
            detokenize=self._detokenize,
        )
        stop.cut(request.resumed_output_ids)
        return stop

    def _open(self, request: GenerationRequest) -> _Running:
        if not self._running:
            self._heard_at = time.monotonic()
        running = _Running(request, has_told_prompt=bool(request.resumed_output_ids))
        self._running[request.request_id] = running
        self._is_idle.clear()
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch(), name="sglang-watch")
        return running

    def _close(self, running: _Running) -> None:
        del self._running[running.request.request_id]
        if not self._running:
            self._is_idle.set()

    async def _next(
        self, running: _Running, items: AsyncGenerator[dict[str, object], None]
    ) -> dict[str, object]:
        """SGLang's next item, unless the deadline or the end of the engine comes first."""
        if self._death is not None:
            raise self._death  # it came while nobody waited for an item
        try:
            async with asyncio.timeout(_remaining_s(running.request)) as running.wait:
                item = await anext(items)
        except TimeoutError as error:
            if self._death is not None:
                raise self._death from error
            raise DeadlineExceededError("The request's deadline has passed.") from error
        except ValueError as error:
            raise RequestRejectedError(str(error)) from error
        finally:
            running.wait = None
        self._heard_at = time.monotonic()
        return item

    def _delta(self, running: _Running, answer: Answer, stop: StopCondition) -> TokenDelta:
        request = running.request
        self._num_preemptions += answer.num_preemptions - running.num_preemptions
        running.num_preemptions = answer.num_preemptions
        running.rounds.update(answer.rounds)
        self._rounds.update(answer.rounds)
        num_kept, end = stop.cut(answer.token_ids)
        self._num_output_tokens += num_kept
        reason = end.reason if end is not None else answer.finish
        return TokenDelta(
            request_id=request.request_id,
            choice_index=request.choice_index,
            token_ids=answer.token_ids[:num_kept],
            logprobs=answer.logprobs[:num_kept],
            prompt_logprobs=answer.prompt_logprobs,
            finish_reason=reason,
            stop_match=end.match if end is not None else answer.match,
            usage=self._usage(request, answer, stop) if reason is not None else None,
            speculation=speculation_stats(running.rounds) if reason is not None else None,
        )

    def _usage(
        self, request: GenerationRequest, answer: Answer, stop: StopCondition
    ) -> GenerationUsage:
        num_prompt_tokens = len(request.prompt_token_ids)
        # SGLang counts resumed output as a part of the prompt.
        num_cached = min(answer.num_cached, num_prompt_tokens)
        num_tier_cached = min(answer.num_tier_cached, num_cached)
        self._num_prompt_tokens += num_prompt_tokens
        self._num_cached_tokens += num_cached
        self._num_tier_cached_tokens += num_tier_cached
        return GenerationUsage(
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=stop.num_output_tokens,
            num_cached_tokens=num_cached,
            num_tier_cached_tokens=num_tier_cached,
        )

    async def _watch(self) -> None:
        """Tell waiting requests at once when SGLang has died."""
        while True:
            await asyncio.sleep(_WATCH_PERIOD_S)
            if (name := self._runtime.dead_process()) is not None:
                self._die(EngineDeadError(f"SGLang's process {name} has ended."))
                return

    def _die(self, death: EngineDeadError) -> None:
        self._death = self._death or death
        now = asyncio.get_running_loop().time()
        for running in self._running.values():
            if running.wait is not None:
                running.wait.reschedule(now)


def _remaining_s(request: GenerationRequest) -> float | None:
    return None if request.deadline is None else request.deadline - time.time()
