"""A target replica: the engine behind a Serve handle."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import ray
from opentelemetry.trace import SpanKind
from ray import serve

from deployments.config import PrefillConfig
from deployments.draft_sessions import DraftSessions
from deployments.engine.base import (
    Embedder,
    HasOwnMetrics,
    Prefiller,
    ReportsPrefixes,
    SharesPages,
)
from deployments.engine.errors import EngineGoneError, RequestRejectedError
from deployments.engine.factory import build_engine
from deployments.engine.sglang_engine.draft_link import DraftLink, DraftSettings
from deployments.engine.speculation.grpc_transport import grpc_connector
from deployments.engine.speculation.handshake import Identity
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.heap import settle_heap
from deployments.model_files import model_folder, served_model_name
from deployments.own_metrics_feed import OwnMetricsFeed
from deployments.prefill_metrics import PrefillMetrics
from deployments.prefill_pool import PrefillPool
from deployments.scaling_stats import TargetScalingStats
from deployments.serve_compat import current_replica_id, uses_tls
from deployments.target_metrics import TargetMetrics
from deployments.token_server import TokenServer
from deployments.token_wire import named_delta
from deployments.tokenizer import load_vocabulary
from deployments.tracing import Tracing, span_export, traceparent_of
from kv_store.calibration import check_codec_loss
from kv_store.factory import build_page_store

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

    from pydantic import SecretStr

    from deployments.config import TracingConfig
    from deployments.engine.base import Engine
    from deployments.engine.config import EngineConfig
    from deployments.engine.embedding import Embedding, EmbeddingRequest
    from deployments.engine.prefixes import Report
    from deployments.engine.speculation.speculator import Speculator
    from deployments.engine.types import GenerationRequest, Prefilled, TokenDelta
    from deployments.ping import Ping
    from deployments.serve_compat import Handle
    from deployments.tokenizer import Vocabulary
    from kv_store.config import KVStoreConfig
    from kv_store.layout import PageLayout
    from kv_store.page_store import PageStore

logger = logging.getLogger(__name__)

_REPORT_PERIOD_S = 2.0
_DRAIN_TIMEOUT_S = 600.0
"""Serve kills the replica after its own, configured grace period; this bound is never the first."""


class TargetReplica:
    """Generates tokens and embeds texts; called by the ingress through a handle.

    A request of the handle may also ask for hidden states (``GenerationRequest.capture``); none of
    the public surfaces does. Replicas of the prefill pool are of this class as well: targets call
    them with prompts whose pages they then load from the KV tier.
    """

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self,
        draft: Handle | None,
        prefill: Handle | None = None,
        *,
        engine: EngineConfig,
        cache_dir: Path,
        kv: KVStoreConfig | None,
        pool_secret: SecretStr,
        tracing: TracingConfig,
        prefill_config: PrefillConfig | None = None,
        service: str = "paceline-target",
    ) -> None:
        """Load the model; takes seconds, on a thread of its own.

        Args:
            draft: handle of the draft pool, or None where there is none.
            prefill: handle of the prefill pool, or None where there is none.
            engine: the engine and its model.
            cache_dir: where models lie that are not local folders.
            kv: the shared KV tier, or None to keep pages in this replica.
            pool_secret: shared with the draft pool, shown when a stream to it is opened.
            tracing: where spans go.
            prefill_config: which prompts the prefill pool computes.
            service: what spans call this process.
        """
        self._replica_id = current_replica_id()
        self._tracing = Tracing(tracing, service)
        self._spans = span_export(tracing)
        self._metrics = TargetMetrics()
        self._own_metrics = OwnMetricsFeed()
        self._scaling = TargetScalingStats()
        self._model = served_model_name(engine)
        self._page_store: PageStore | None = None
        self._split: SplitSpeculator | DraftLink | None = None
        self._sessions: DraftSessions | None = None
        folder = model_folder(engine.model, cache_dir)
        self._executor = ThreadPoolExecutor(1, "engine-lifecycle")
        loop = asyncio.get_running_loop()
        tokenizer = await loop.run_in_executor(self._executor, load_vocabulary, engine, folder)
        speculator = self._build_speculator(draft, engine, tokenizer, pool_secret)
        self._engine: Engine = await loop.run_in_executor(
            self._executor, self._build_engine, engine, cache_dir, kv, speculator, tokenizer
        )
        self._prefill_pool: PrefillPool | None = None
        if prefill is not None and isinstance(self._engine, Prefiller):
            self._prefill_pool = PrefillPool(
                prefill,
                prefill_config or PrefillConfig(),
                self._engine,
                self._tracing,
                PrefillMetrics(),
            )
        self._tokens = TokenServer(self._deltas, self._replica_id)
        await self._tokens.start(ray.util.get_node_ip_address())
        self._reporting = asyncio.create_task(self._report(), name="target-metrics")
        settle_heap()

    def record_replica_metadata(self) -> dict[str, str]:
        """What routers learn of this replica; Serve asks once."""
        # Tokens then travel as Ray's own messages do: encrypted.
        return {} if uses_tls() else self._tokens.metadata()

    async def generate(
        self, request: GenerationRequest
    ) -> AsyncGenerator[tuple[TokenDelta, ...], None]:
        """Generate one sequence; closing the stream aborts it and frees its pages.

        The first delta has no tokens: it names the replica, so that the caller can avoid it should
        it die before its first token.

        Returns:
            Deltas; those of one item came together.

        Raises:
            EngineError: see ``Engine.generate``.
        """
        yield (named_delta(request, self._replica_id),)
        async with aclosing(self._deltas(request)) as deltas:
            async for delta in deltas:
                yield (replace(delta, replica_id=self._replica_id),)

    async def _deltas(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        attributes: dict[str, str | int | float] = {
            "paceline.replica": self._replica_id,
            "paceline.resumed_tokens": len(request.resumed_output_ids),
        }
        async with AsyncExitStack() as stack:
            span = stack.enter_context(
                self._tracing.span(
                    "target.generate", request.traceparent, attributes, kind=SpanKind.SERVER
                )
            )
            if (own := traceparent_of(span)) != request.traceparent:
                request = replace(request, traceparent=own)
            try:
                ahead = None
                if self._prefill_pool is not None:
                    num_backlog = self._engine.stats().num_backlog_tokens
                    ahead = await self._prefill_pool.ahead(request, num_backlog)
                # More targets would not shorten the wait for the prefill pool.
                came_at, has_tokens = time.monotonic(), False
                if self._sessions is not None and request.speculation:
                    stack.enter_context(self._sessions.session(request.request_id))
                deltas = await stack.enter_async_context(
                    aclosing(_closable(self._engine.generate(request)))
                )
                async for delta in deltas:
                    if delta.token_ids and not has_tokens:
                        has_tokens = True
                        self._scaling.first_token(time.monotonic() - came_at)
                        if ahead is not None:
                            ahead.first_token()
                    if ahead is not None and delta.usage is not None:
                        delta = replace(delta, usage=ahead.usage(delta.usage))
                    yield delta
            except EngineGoneError as error:
                raise error.at(self._replica_id) from error

    async def prefill(self, request: GenerationRequest) -> AsyncGenerator[str | Prefilled, None]:
        """Compute a prompt's pages for a target replica; ends once they are in the KV tier.

        The first item is the name of the replica, which now has the prompt, the second one what
        became of it. Closing the stream aborts it and frees its pages.

        Raises:
            RequestRejectedError: this replica's engine does not compute prompts for others.
            EngineError: see ``Prefiller.prefill``.
        """
        if not isinstance(self._engine, Prefiller):
            raise RequestRejectedError("This model's engine computes no prompts for others.")
        yield self._replica_id
        attributes: dict[str, str | int | float] = {"paceline.replica": self._replica_id}
        came_at = time.monotonic()
        with self._tracing.span(
            "target.prefill", request.traceparent, attributes, kind=SpanKind.SERVER
        ) as span:
            request = replace(request, traceparent=traceparent_of(span))
            try:
                prefilled = await self._engine.prefill(request)
            except EngineGoneError as error:
                raise error.at(self._replica_id) from error
        self._scaling.first_token(time.monotonic() - came_at)
        yield prefilled

    async def embed(self, request: EmbeddingRequest) -> Embedding:
        """Embed one text; cancelling the call aborts it and frees its pages.

        Raises:
            RequestRejectedError: this replica's engine gives no embeddings.
            EngineError: see ``Embedder.embed``.
        """
        if not isinstance(self._engine, Embedder):
            raise RequestRejectedError("This model's engine gives no embeddings.")
        attributes: dict[str, str | int | float] = {"paceline.replica": self._replica_id}
        with self._tracing.span(
            "target.embed", request.traceparent, attributes, kind=SpanKind.SERVER
        ) as span:
            request = replace(request, traceparent=traceparent_of(span))
            try:
                embedding = await self._engine.embed(request)
            except EngineGoneError as error:
                raise error.at(self._replica_id) from error
        return replace(embedding, replica_id=self._replica_id)

    async def ping(self, _: Ping) -> str:
        """This replica's id, if its engine makes progress.

        Raises:
            EngineDeadError: it does not; names the replica.
        """
        try:
            self._engine.check_health()
        except EngineGoneError as error:
            raise error.at(self._replica_id) from error
        return self._replica_id

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy learns of this replica; Serve asks."""
        spec = self._split.stats() if self._split is not None else None
        return self._scaling.figures(self._engine.stats(), spec)

    def record_routing_stats(self) -> Report:
        """What the routers learn of this replica; Serve asks."""
        if isinstance(self._engine, ReportsPrefixes):
            return self._engine.held_prefixes()
        return {}

    def check_health(self) -> None:
        """Serve's health check: an engine that died has the replica replaced."""
        self._engine.check_health()

    async def __del__(self) -> None:
        """Serve's shutdown hook: let running sequences end, then stop."""
        self._reporting.cancel()
        self._tokens.is_refusing = True
        await self._engine.drain(_DRAIN_TIMEOUT_S)
        await self._tokens.close()
        if self._sessions is not None:
            await self._sessions.close()
        await self._engine.close()
        self._tracing.close()
        self._executor.shutdown(wait=False)

    def _build_speculator(
        self,
        draft: Handle | None,
        engine: EngineConfig,
        tokenizer: Vocabulary,
        pool_secret: SecretStr,
    ) -> Speculator:
        if not engine.takes_drafts:
            return NoSpeculation()
        if draft is None:
            if engine.kind == "sglang":
                return NoSpeculation()
            self._split = SplitSpeculator(engine.speculation, vocab_size=tokenizer.vocab_size)
            return self._split
        identity = Identity(
            model=self._model,
            vocab_size=tokenizer.vocab_size,
            vocab_digest=tokenizer.vocab_digest(),
        )
        speculator: SplitSpeculator | DraftLink
        if engine.kind == "sglang":
            settings = DraftSettings(engine.speculation, identity, self._replica_id, pool_secret)
            speculator = DraftLink(settings, self._on_link_lost)
        else:
            speculator = SplitSpeculator(
                engine.speculation,
                vocab_size=tokenizer.vocab_size,
                connect=grpc_connector(
                    identity, self._replica_id, pool_secret, tls=engine.speculation.pool_tls
                ),
                on_link_lost=self._on_link_lost,
            )
        self._sessions = DraftSessions(draft, speculator)
        self._split = speculator
        return speculator

    def _on_link_lost(self, endpoint: str) -> None:
        if self._sessions is not None:
            self._sessions.link_lost(endpoint)

    def _build_engine(
        self,
        engine: EngineConfig,
        cache_dir: Path,
        kv: KVStoreConfig | None,
        speculator: Speculator,
        tokenizer: Vocabulary,
    ) -> Engine:
        def page_store(layout: PageLayout) -> PageStore:
            if kv is None:
                raise RuntimeError("a page store was asked for without a configuration")
            check_codec_loss(kv, layout, cache_dir)
            self._page_store = build_page_store(kv, layout)
            return self._page_store

        return build_engine(
            engine,
            cache_dir=cache_dir,
            page_store_factory=page_store if kv is not None else None,
            speculator=speculator,
            detokenize=tokenizer.decode,
            tokenizer_json=tokenizer.to_json,
            kv=kv,
            spans=self._spans,
        )

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_PERIOD_S)
            self._metrics.engine(self._engine.stats())
            if self._split is not None:
                self._metrics.speculator(self._split.stats())
            if self._page_store is not None:
                self._metrics.page_store(self._page_store.stats())
            elif isinstance(self._engine, SharesPages):
                pages = await asyncio.to_thread(self._engine.page_store_stats)
                if pages is not None:
                    self._metrics.page_store(pages)
            if isinstance(self._engine, HasOwnMetrics):
                self._own_metrics.update(await asyncio.to_thread(self._engine.own_metrics))
            if self._sessions is not None:
                self._metrics.draft_sessions(self._sessions.num_attached)


def _closable(deltas: AsyncIterator[TokenDelta]) -> AsyncGenerator[TokenDelta, None]:
    """Engines promise that closing the iterator aborts the request, so it can be closed."""
    return cast("AsyncGenerator[TokenDelta, None]", deltas)


TargetDeployment = serve.deployment(name="target", max_ongoing_requests=64)(TargetReplica)
