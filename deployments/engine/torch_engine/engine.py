"""The torch engine: one thread that computes, and the event loop's view of it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.engine.base import Embedder, Engine, Prefiller
from deployments.engine.embedding import pooled
from deployments.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    EngineError,
    EngineOverloadedError,
    RequestRejectedError,
)
from deployments.engine.torch_engine.delta_stream import DeltaStream
from deployments.engine.torch_engine.mailbox import Submission
from deployments.engine.torch_engine.prompt_pages import PromptPages, prompt_alone
from deployments.engine.types import FinishReason, Prefilled
from deployments.engine.validation import validate_request
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from opentelemetry.context import Context
    from opentelemetry.trace import Span

    from deployments.engine.embedding import Embedding, EmbeddingRequest
    from deployments.engine.speculation.speculator import Speculator
    from deployments.engine.torch_engine.core import EngineCore, Event
    from deployments.engine.torch_engine.mailbox import Mailbox
    from deployments.engine.torch_engine.structure.compiler import StructureCompiler
    from deployments.engine.torch_engine.structure.constraint import Constraint
    from deployments.engine.types import EngineStats, GenerationRequest, TokenDelta
    from deployments.engine.validation import ModelLimits
    from kv_store.page_store import PageStore

logger = logging.getLogger(__name__)
tracer = trace.get_tracer(__name__)

_HANGS_AFTER_S = 120.0
"""A step that takes longer than this counts as hung."""
_JOIN_TIMEOUT_S = 30.0


class TorchEngine(Engine, Embedder, Prefiller):
    """Runs an ``EngineCore`` in its own thread."""

    def __init__(
        self,
        core: EngineCore,
        mailbox: Mailbox,
        limits: ModelLimits,
        speculator: Speculator,
        store: PageStore | None,
        structures: StructureCompiler,
    ) -> None:
        """Start the engine thread.

        Args:
            core: from here on only touched by the engine thread.
            mailbox: its way in.
            limits: of the model.
            speculator: shut down with the engine.
            store: closed with the engine.
            structures: closed with the engine.
        """
        self._core = core
        self._mailbox = mailbox
        self._limits = limits
        self._speculator = speculator
        self._store = store
        self._pages = PromptPages(core.transfer, store)
        self._structures = structures
        self._streams: dict[int, DeltaStream] = {}
        self._session_of: dict[str, int] = {}
        self._aborted_ids: set[int] = set()
        self._num_sessions = 0
        self._has_no_streams = asyncio.Event()
        self._has_no_streams.set()
        self._is_draining = False
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._death: EngineDeadError | None = None
        self._step_began_at: float | None = None
        self._stats = core.stats()
        self._thread = threading.Thread(target=self._run, name="torch-engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """See ``Engine.generate``; errors come with the first delta."""
        self._refuse_if_impossible(request)
        self._loop = asyncio.get_running_loop()
        session_id, stream = self._open_stream(request)
        is_ended = False
        has_tokens = False
        span = tracer.start_span("engine.generate", _parent_context(request))
        try:
            structure = await self._prepare(request)
            if not self._mailbox.submit(Submission(session_id, request, structure)):
                is_ended = True
                raise EngineOverloadedError("The engine's waiting queue is full.")
            if session_id in self._aborted_ids:
                # The engine thread did not know the request when it was told to end it.
                self._mailbox.abort(session_id)
            while not is_ended:
                delta = await stream.next()
                is_ended = delta.finish_reason is not None
                if delta.token_ids and not has_tokens:
                    has_tokens = True
                    span.add_event("first token")
                if is_ended:
                    _describe_end(span, delta)
                yield delta
        except EngineError as error:
            is_ended = True
            span.record_exception(error)
            raise
        finally:
            span.end()
            self._close_stream(request, session_id)
            if not is_ended:
                self._mailbox.abort(session_id)

    async def embed(self, request: EmbeddingRequest) -> Embedding:
        """See ``Embedder.embed``."""
        async with aclosing(self.generate(request.as_generation())) as deltas:
            return await pooled(request, deltas)

    async def count_cached(self, request: GenerationRequest, timeout_s: float) -> int:
        """See ``Prefiller.count_cached``."""
        self._refuse_if_impossible(request)
        return await self._pages.count_cached(self._pages.keys(request), timeout_s) * PAGE_TOKENS

    async def prefill(self, request: GenerationRequest) -> Prefilled:
        """See ``Prefiller.prefill``."""
        self._refuse_if_impossible(request)
        keys = self._pages.keys(request)
        if not keys:
            return Prefilled(num_prompt_tokens=0)
        num_shared = await self._pages.count_shared(keys)
        num_cached = 0
        async with aclosing(self.generate(prompt_alone(request, len(keys), num_shared))) as deltas:
            async for delta in deltas:
                if delta.finish_reason is FinishReason.ABORT:
                    raise EngineError("The request was aborted.")
                num_cached = delta.usage.num_cached_tokens if delta.usage else num_cached
        num_shared = await self._pages.until_shared(keys, request.deadline)
        return Prefilled(
            num_prompt_tokens=len(keys) * PAGE_TOKENS,
            num_cached_tokens=num_cached,
            num_shared_tokens=num_shared * PAGE_TOKENS,
        )

    def abort(self, request_id: str) -> None:
        """See ``Engine.abort``."""
        session_id = self._session_of.get(request_id)
        if session_id is not None:
            self._aborted_ids.add(session_id)
            self._mailbox.abort(session_id)

    def stats(self) -> EngineStats:
        """See ``Engine.stats``."""
        return self._stats

    def check_health(self) -> None:
        """See ``Engine.check_health``."""
        if self._death is not None:
            raise self._death
        began_at = self._step_began_at
        if began_at is not None and time.monotonic() - began_at > _HANGS_AFTER_S:
            raise EngineDeadError(f"An engine step has not ended for {_HANGS_AFTER_S:.0f} s.")

    async def drain(self, timeout_s: float) -> None:
        """See ``Engine.drain``."""
        self._is_draining = True
        try:
            await asyncio.wait_for(self._has_no_streams.wait(), timeout_s)
        except TimeoutError:
            logger.warning("%d requests still run after the drain time", len(self._streams))

    async def close(self) -> None:
        """See ``Engine.close``. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._mailbox.close()
        await asyncio.to_thread(self._thread.join, _JOIN_TIMEOUT_S)
        self._die(EngineDeadError("The engine has been closed."))
        self._structures.close()
        await asyncio.to_thread(self._speculator.shutdown)
        if self._store is not None:
            await asyncio.to_thread(self._store.close)

    def _refuse_if_impossible(self, request: GenerationRequest) -> None:
        if self._death is not None:
            raise self._death
        if self._is_closed:
            raise EngineDeadError("The engine has been closed.")
        if self._is_draining:
            raise EngineDrainingError("The engine is draining.")
        validate_request(request, self._limits)
        if request.request_id in self._session_of:
            raise RequestRejectedError("A request with this id is running.", "request_id")
        if request.deadline is not None and time.time() >= request.deadline:
            raise DeadlineExceededError("The request's deadline has passed.")

    async def _prepare(self, request: GenerationRequest) -> Constraint | None:
        """Compile the request's structure, if it has one; other requests go on meanwhile."""
        structure = request.sampling.structure
        if structure is None:
            return None
        return await self._structures.compile(structure, self._limits.stop_token_ids(request))

    def _open_stream(self, request: GenerationRequest) -> tuple[int, DeltaStream]:
        self._num_sessions += 1
        stream = DeltaStream()
        self._streams[self._num_sessions] = stream
        self._session_of[request.request_id] = self._num_sessions
        self._has_no_streams.clear()
        return self._num_sessions, stream

    def _close_stream(self, request: GenerationRequest, session_id: int) -> None:
        self._aborted_ids.discard(session_id)
        del self._streams[session_id]
        del self._session_of[request.request_id]
        if not self._streams:
            self._has_no_streams.set()

    def _run(self) -> None:
        """The engine thread."""
        try:
            self._serve()
        except Exception as error:
            logger.exception("the engine thread has died")
            death = EngineDeadError(f"The engine thread has died: {type(error).__name__}.")
            self._death = death
            self._tell_loop([], death)

    def _serve(self) -> None:
        timeout_s: float | None = None
        while not (commands := self._mailbox.take(timeout_s)).is_closing:
            self._step_began_at = time.monotonic()
            # Requests first: whatever is aborted was submitted before.
            for submission in commands.requests:
                self._core.add(*submission)
            for session_id in commands.aborted_ids:
                self._core.abort(session_id)
            has_worked = self._core.step()
            self._step_began_at = None
            self._stats = self._core.stats()
            if events := self._core.take_events():
                self._tell_loop(events, None)
            timeout_s = 0.0 if has_worked else self._core.idle_s()

    def _tell_loop(self, events: list[Event], death: EngineDeadError | None) -> None:
        """The one hop per step from the engine thread to the event loop."""
        if self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(self._receive, events, death)
        except RuntimeError:
            # The loop is closed, so nobody is left to read.
            logger.warning("the event loop is closed; %d engine events are lost", len(events))

    def _receive(self, events: list[Event], death: EngineDeadError | None) -> None:
        for event in events:
            stream = self._streams.get(event.session_id)
            if stream is not None:
                stream.push(event.content)
        if death is not None:
            self._die(death)

    def _die(self, death: EngineDeadError) -> None:
        self._death = self._death or death
        for stream in self._streams.values():
            stream.push(death)


def _parent_context(request: GenerationRequest) -> Context | None:
    if request.traceparent is None:
        return None
    return TraceContextTextMapPropagator().extract({"traceparent": request.traceparent})


def _describe_end(span: Span, delta: TokenDelta) -> None:
    if delta.usage is not None:
        span.set_attribute("gen_ai.usage.input_tokens", delta.usage.num_prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", delta.usage.num_output_tokens)
        span.set_attribute("paceline.cached_tokens", delta.usage.num_cached_tokens)
        span.set_attribute("paceline.tier_cached_tokens", delta.usage.num_tier_cached_tokens)
    if delta.finish_reason is not None:
        span.set_attribute("gen_ai.response.finish_reasons", [delta.finish_reason.value])
