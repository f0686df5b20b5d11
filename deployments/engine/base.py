"""The engine seam: what every engine promises to the deployment above it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from deployments.engine.embedding import Embedding, EmbeddingRequest
    from deployments.engine.own_metrics import Sample
    from deployments.engine.prefixes import Report
    from deployments.engine.types import EngineStats, GenerationRequest, Prefilled, TokenDelta
    from kv_store.page_store import PageStoreStats


class Engine(ABC):
    """Generates tokens for many requests at once.

    Methods are called from one event loop; none of them blocks it. Every accepted request ends in
    exactly one terminal event: a delta with a finish reason, or an exception from the iterator.
    """

    @abstractmethod
    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Generate one sequence.

        Closing the iterator (or cancelling the task that reads it) aborts the request and frees
        its pages.

        Raises:
            RequestRejectedError: the request can never be served (too long, token id out of
                range, hidden states of an engine that has none to give).
            EngineOverloadedError: the waiting queue is full.
            DeadlineExceededError: the deadline passed first.
            EngineDrainingError: ``drain`` was called.
            EngineDeadError: the engine thread has died.
        """

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """End a request with finish reason ``abort``; unknown ids are ignored."""

    @abstractmethod
    def stats(self) -> EngineStats:
        """A snapshot, at most one step old."""

    @abstractmethod
    def check_health(self) -> None:
        """Return if the engine makes progress.

        Raises:
            EngineDeadError: the engine thread has died or hangs.
        """

    @abstractmethod
    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests and wait until running ones ended, ``timeout_s`` at most."""

    @abstractmethod
    async def close(self) -> None:
        """Stop threads and free memory; requests still running end in EngineDeadError."""


@runtime_checkable
class ReportsPrefixes(Protocol):
    """An engine that knows which prefixes its pages hold."""

    def held_prefixes(self) -> Report:
        """For the routers, see ``prefixes.report``; empty where it is not known."""


@runtime_checkable
class HasOwnMetrics(Protocol):
    """An engine that keeps figures of its own accord."""

    def own_metrics(self) -> Sequence[Sample]:
        """A snapshot; blocks for some milliseconds."""


@runtime_checkable
class SharesPages(Protocol):
    """An engine that opens the KV tier itself, in processes of its own."""

    def page_store_stats(self) -> PageStoreStats | None:
        """A snapshot of the tier's counters; None where no pages are shared."""


@runtime_checkable
class Prefiller(Protocol):
    """The ability to compute prompts for other replicas, and to tell whether that is worth it."""

    async def count_cached(self, request: GenerationRequest, timeout_s: float) -> int:
        """Leading tokens of a text whose pages this replica or the KV tier has: a hint.

        Args:
            request: whose prompt and resumed output it is.
            timeout_s: after which the tier has nothing.

        Raises:
            EngineError: ``Engine.generate`` would refuse it.
        """

    async def prefill(self, request: GenerationRequest) -> Prefilled:
        """Compute a text's full pages and wait until they are written to the KV tier.

        Cancelling the task aborts the request and frees its pages.

        Args:
            request: whose prompt and resumed output it is. Its deadline bounds the wait as well:
                what is not written shortly before it does not count.

        Raises:
            EngineError: as ``Engine.generate``.
        """


@runtime_checkable
class Embedder(Protocol):
    """The ability to embed texts, beside generating them."""

    async def embed(self, request: EmbeddingRequest) -> Embedding:
        """Embed one text. Cancelling the task aborts the request and frees its pages.

        Raises:
            EngineError: as ``Engine.generate``.
        """
