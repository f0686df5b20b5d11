"""Prompts that a target replica has computed by the prefill pool: it dumps pages, this one loads.

The pool only fills the KV tier. What it does not do, or not in time, is a miss like any other: the
target's ordinary load finds fewer pages, and the target computes the rest. So nothing at the pool
can change a text or fail a request.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from opentelemetry.trace import SpanKind

from deployments.engine.errors import DeadlineExceededError, EngineOverloadedError
from deployments.prefill_choice import Prompt, PromptCosts, Reason, choose
from deployments.serve_compat import is_queue_full, is_replica_lost, original_error
from deployments.tracing import traceparent_of
from kv_store.tiers.breaker import CircuitBreaker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from opentelemetry.trace import Span

    from deployments.config import PrefillConfig
    from deployments.engine.base import Prefiller
    from deployments.engine.types import GenerationRequest, GenerationUsage, Prefilled
    from deployments.prefill_choice import TokenCost
    from deployments.prefill_metrics import PrefillMetrics
    from deployments.serve_compat import Handle
    from deployments.tracing import Tracing

logger = logging.getLogger(__name__)

_LOOK_TIMEOUT_S = 0.25
_MIN_LEARNT_TOKENS = 128
"""Of a shorter prompt most of the time goes to other things than its tokens."""
_DEADLINE_SHARE = 0.5
"""Of the time a request has left; a pool that gives nothing must leave time to do without it."""
_MAX_FAILURES = 3
_LEFT_ALONE_S = 1.0
_MAX_LEFT_ALONE_S = 30.0


class _NoRoomError(TimeoutError):
    """No replica took the prompt in time."""


class PromptAhead:
    """One request's prompt, from the question to the pool to its first token."""

    def __init__(
        self,
        pool: PrefillPool,
        *,
        num_backlog: int,
        max_cached_tokens: int | None = None,
    ) -> None:
        """Start the clock of the request's time at this replica.

        Args:
            pool: learns what tokens cost.
            num_backlog: tokens that this replica has to compute before it.
            max_cached_tokens: of the prompt, that were cached before the pool was asked; None if
                it was not.
        """
        self._pool = pool
        self._num_backlog = num_backlog
        self._max_cached_tokens = max_cached_tokens
        self._began_at = pool.clock()
        self._waited_s: float | None = None

    def first_token(self) -> None:
        """The request has its first token."""
        if self._waited_s is None:
            self._waited_s = self._pool.clock() - self._began_at

    def usage(self, usage: GenerationUsage) -> GenerationUsage:
        """The request's own account: what the pool computed for it was not cached.

        It is what the request would have been told without a pool.
        """
        num_computed = usage.num_prompt_tokens - usage.num_cached_tokens
        if self._max_cached_tokens is None:
            if self._waited_s is not None and num_computed >= _MIN_LEARNT_TOKENS:
                num_tokens = num_computed + self._num_backlog
                self._pool.learn(self._pool.costs.here, self._waited_s, num_tokens)
            return usage
        num_loaded = usage.num_tier_cached_tokens
        if self._waited_s is not None and num_loaded >= _MIN_LEARNT_TOKENS:
            self._pool.learn(self._pool.costs.load, self._waited_s, num_loaded)
        num_cached = min(usage.num_cached_tokens, self._max_cached_tokens)
        num_tier = min(num_loaded, num_cached)
        return replace(usage, num_cached_tokens=num_cached, num_tier_cached_tokens=num_tier)


class PrefillPool:
    """The pool as one target replica sees it. Used from one event loop."""

    def __init__(
        self,
        pool: Handle,
        config: PrefillConfig,
        engine: Prefiller,
        tracing: Tracing,
        metrics: PrefillMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wrap a deployment handle.

        Args:
            pool: handle of the prefill deployment.
            config: when it is asked.
            engine: of this target replica; knows what is cached.
            tracing: of this process.
            metrics: what happens is told there.
            clock: seconds, monotonic.
        """
        self._prefill = pool.options(stream=True, method_name="prefill")
        self._config = config
        self._engine = engine
        self._tracing = tracing
        self._metrics = metrics
        self._breaker = CircuitBreaker(
            max_failures=_MAX_FAILURES,
            open_s=_LEFT_ALONE_S,
            max_open_s=_MAX_LEFT_ALONE_S,
            clock=clock,
        )
        self._num_in_flight = 0
        self.clock = clock
        self.costs = PromptCosts()

    async def ahead(self, request: GenerationRequest, num_backlog: int) -> PromptAhead:
        """Have the prompt's pages written to the tier, if that is worth it; returns once they are.

        Whatever goes wrong at the pool, the caller computes the prompt.

        Args:
            request: half of the time to its deadline bounds the wait as well.
            num_backlog: tokens that this replica has to compute before it.

        Raises:
            EngineError: this replica's own engine refuses the request.
        """
        num_tokens = len(request.prompt_token_ids) + len(request.resumed_output_ids)
        num_cached = 0
        # Not even the tier is asked about short prompts.
        if num_tokens >= self._config.min_tokens and not _computes_its_prompt(request):
            num_cached = await self._engine.count_cached(request, _LOOK_TIMEOUT_S)
        prompt = Prompt(
            num_tokens=num_tokens,
            num_uncached=num_tokens - num_cached,
            num_backlog=num_backlog,
            num_in_flight=self._num_in_flight,
            is_reusable=not _computes_its_prompt(request),
        )
        reason = choose(prompt, self.costs, self._config, self.clock())
        if reason is Reason.SENT and not self._breaker.allow():
            reason = Reason.FAILING
        self._metrics.chosen(reason)
        if reason is not Reason.SENT:
            return PromptAhead(self, num_backlog=num_backlog)
        prefilled = await self._send(request, num_cached)
        if prefilled is not None:
            num_cached = max(num_cached, prefilled.num_cached_tokens)
        return PromptAhead(self, num_backlog=num_backlog, max_cached_tokens=num_cached)

    def learn(self, cost: TokenCost, seconds: float, num_tokens: int) -> None:
        """One of ``costs`` was seen once more."""
        cost.learn(seconds, num_tokens, self.clock())
        self._metrics.costs(self.costs, self.clock())

    async def _send(self, request: GenerationRequest, num_cached: int) -> Prefilled | None:
        """The pool's answer; None if there was none. The breaker was asked before.

        Args:
            request: whose prompt it is.
            num_cached: its leading tokens that can be had without the pool.
        """
        self._num_in_flight += 1
        self._metrics.in_flight(self._num_in_flight)
        began_at = self.clock()
        outcome, prefilled = "cancelled", None
        attributes: dict[str, str | int | float] = {"paceline.request": request.request_id}
        try:
            with self._tracing.span(
                "target.prefill_ahead", request.traceparent, attributes, kind=SpanKind.CLIENT
            ) as span:
                outcome, prefilled = await self._outcome(request, num_cached, span)
        finally:
            self._num_in_flight -= 1
            self._metrics.in_flight(self._num_in_flight)
            seconds = self.clock() - began_at
            self._metrics.ended(outcome, seconds)
            if outcome == "loadable":
                self._breaker.record_success()
            elif outcome != "cancelled" or not self._breaker.is_closed:
                # A probe that was cancelled has to be answered for, or no other is ever made.
                self._breaker.record_failure()
        if prefilled is not None:
            num_computed = prefilled.num_prompt_tokens - prefilled.num_cached_tokens
            self._metrics.computed(num_computed)
            # One that waited for another request's computing says nothing of a token's cost.
            if num_computed >= _MIN_LEARNT_TOKENS:
                self.learn(self.costs.pool, seconds, num_computed)
        return prefilled

    async def _outcome(
        self, request: GenerationRequest, num_cached: int, span: Span
    ) -> tuple[str, Prefilled | None]:
        """How the call ended, a metric's label, and the pool's answer if there is one."""
        prefilled: Prefilled | None = None
        try:
            prefilled = await self._call(request, traceparent_of(span))
        except _NoRoomError:
            outcome = "overloaded"
        except TimeoutError:
            outcome = "timeout"
        except Exception as error:  # noqa: BLE001 - whatever it is, the target computes the prompt
            outcome = _failure(original_error(error))
            span.record_exception(error)
        else:
            outcome = "loadable" if prefilled.num_shared_tokens > num_cached else "in_vain"
            span.set_attribute("paceline.shared_tokens", prefilled.num_shared_tokens)
            span.set_attribute("paceline.cached_tokens", prefilled.num_cached_tokens)
        span.set_attribute("paceline.outcome", outcome)
        if outcome != "loadable":
            logger.info("the prefill pool gave nothing for %s: %s", request.request_id, outcome)
        return outcome, prefilled

    async def _call(self, request: GenerationRequest, traceparent: str | None) -> Prefilled:
        timeout_s = self._config.timeout_s
        if request.deadline is not None:
            left_s = max(0.0, request.deadline - time.time())
            timeout_s = min(timeout_s, _DEADLINE_SHARE * left_s)
        asked = replace(
            request,
            # A request that another target resumes may meet its own first prefill.
            request_id=f"{request.request_id}-prefill-{secrets.token_hex(4)}",
            deadline=time.time() + timeout_s,
            traceparent=traceparent or request.traceparent,
            avoid_replicas=(),
        )
        stream = self._prefill.remote(asked)
        ends_at = asyncio.get_running_loop().time() + timeout_s
        try:
            items = aiter(stream)
            await self._until_taken(items, timeout_s)
            async with asyncio.timeout_at(ends_at):
                answer: Prefilled = await anext(items)
                async for _ in items:
                    pass  # Read to its end: a stream that is left early counts as cancelled.
        except (TimeoutError, asyncio.CancelledError):
            stream.cancel()
            raise
        return answer

    async def _until_taken(self, items: AsyncIterator[Prefilled | None], timeout_s: float) -> None:
        """Wait for the first item, by which a replica says that it has the prompt.

        Serve has a call wait where every replica is full, and also where there is none.
        """
        try:
            async with asyncio.timeout(min(timeout_s, self._config.queue_timeout_s)):
                await anext(items)
        except TimeoutError as error:
            raise _NoRoomError from error


def _computes_its_prompt(request: GenerationRequest) -> bool:
    """Whether cached pages would be of no use to a request."""
    if request.capture is not None and request.capture.includes_prompt:
        return True
    return request.sampling.num_prompt_logprobs is not None and not request.resumed_output_ids


def _failure(error: Exception) -> str:
    if is_queue_full(error) or isinstance(error, EngineOverloadedError):
        return "overloaded"
    if isinstance(error, DeadlineExceededError):
        return "timeout"
    return "lost" if is_replica_lost(error) else "failed"
