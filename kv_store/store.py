"""The store behind the engine's seam: tiers, codec and queue on one IO thread."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kv_store.chain_loader import ChainLoader, LoadedPage
from kv_store.page_mover import PageMover
from kv_store.page_store import LoadedPages, PageStore, PageStoreStats
from kv_store.single_flight import SingleFlight
from kv_store.spans import describe, kv_span
from kv_store.write_back import PageWriter, PendingWrite, WriteBackQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from contextlib import ExitStack

    from numpy.typing import NDArray

    from kv_store.codecs.base import Codec
    from kv_store.config import KVStoreConfig
    from kv_store.keys import PageKey
    from kv_store.landing import Landing
    from kv_store.layout import PageLayout
    from kv_store.tiers.guarded import GuardedTier

logger = logging.getLogger(__name__)

_NOTHING = LoadedPages((), ())
_SHUTDOWN_S = 5.0
_WRITING_SHARE = 0.8
"""Of the time that a chain's pages are waited for; the rest is for looking which are there."""


class _Load(NamedTuple):
    keys: Sequence[PageKey]
    into: Sequence[Landing] | None
    deadline: float
    traceparent: str | None
    future: Future[LoadedPages]


class TieredPageStore(PageStore):
    """See ``PageStore``. Build it with ``kv_store.factory.build_page_store``."""

    def __init__(
        self,
        *,
        config: KVStoreConfig,
        layout: PageLayout,
        codec: Codec,
        tiers: Sequence[GuardedTier],
        owned: ExitStack,
    ) -> None:
        """Start the IO thread.

        Args:
            config: bounds and time limits; its tiers are already built.
            layout: of every page.
            codec: packs every page.
            tiers: hot first; owned from here on.
            owned: what else to release at ``close``.
        """
        self._layout = layout
        self._codec = codec
        self._tiers = tiers
        self._owned = owned
        self._max_pending_loads = config.max_pending_loads
        self._close_timeout_s = config.close_timeout_s
        self._queue = WriteBackQueue(
            max_pages=config.write_back.max_pages, max_bytes=config.write_back.max_bytes
        )
        self._codec_threads = ThreadPoolExecutor(
            config.num_codec_threads, thread_name_prefix="kv-codec"
        )
        self._mover: PageMover | None = None
        if config.moves is not None and len(tiers) > 1:
            self._mover = PageMover(
                tiers=tiers,
                config=config.moves,
                codec_threads=self._codec_threads,
                batch_pages=config.load_batch_pages,
                clock=time.monotonic,
            )
        self._writer = PageWriter(
            queue=self._queue,
            tiers=tiers,
            layout=layout,
            codec=codec,
            codec_threads=self._codec_threads,
            batch_pages=config.write_back.batch_pages,
            on_written=self._mover.written if self._mover else None,
        )
        shared = next((tier for tier in tiers if tier.is_shared), None)
        self._flight: SingleFlight | None = None
        if config.single_flight is not None and shared is not None:
            self._flight = SingleFlight(shared, config.single_flight, clock=time.monotonic)
        self._loader = ChainLoader(
            tiers=tiers,
            layout=layout,
            codec=codec,
            codec_threads=self._codec_threads,
            num_codec_threads=config.num_codec_threads,
            batch_pages=config.load_batch_pages,
            single_flight=self._flight,
        )
        self._lock = threading.Lock()  # guards the five below
        self._is_closed = False
        self._pending: set[Future[LoadedPages]] = set()
        self._questions: set[Future[int]] = set()
        self._num_loaded = 0
        self._num_refused = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="kv-io", daemon=True)
        self._thread.start()

    @property
    def fidelity(self) -> str:
        """See ``PageStore``; the codec decides."""
        return self._codec.fidelity

    def load(
        self,
        keys: Sequence[PageKey],
        *,
        timeout_s: float,
        into: Sequence[Landing] | None = None,
        traceparent: str | None = None,
    ) -> Future[LoadedPages]:
        """See ``PageStore``."""
        deadline = time.monotonic() + timeout_s  # the clock of the event loop
        future: Future[LoadedPages] = Future()
        future.set_running_or_notify_cancel()  # the caller cannot cancel what the thread resolves
        with self._lock:
            is_refused = len(self._pending) >= self._max_pending_loads
            self._num_refused += is_refused
            if is_refused or self._is_closed or not keys:
                future.set_result(_NOTHING)
                return future
            self._pending.add(future)
            asked = _Load(tuple(keys), into, deadline, traceparent, future)
            self._loop.call_soon_threadsafe(
                lambda: self._spawn(self._loop.create_task(self._load(asked)))
            )
        return future

    def save(
        self, key: PageKey, page: NDArray[np.uint8], *, traceparent: str | None = None
    ) -> bool:
        """See ``PageStore``."""
        if page.dtype != np.uint8 or page.shape != (self._layout.nbytes,):
            logger.error(
                "refused a page of %s %s, expected [%d] uint8",
                page.shape,
                page.dtype,
                self._layout.nbytes,
            )
            return False
        with self._lock:
            if self._is_closed or not self._queue.put(PendingWrite(key, page, traceparent)):
                return False
            self._loop.call_soon_threadsafe(self._writer.wake)
        return True

    def stats(self) -> PageStoreStats:
        """See ``PageStore``."""
        return PageStoreStats(
            num_loaded=self._num_loaded,
            num_saved=self._writer.num_saved,
            num_dropped=self._queue.num_dropped,
            num_queued=self._queue.num_queued,
            num_failed=self._writer.num_failed,
            num_loads_refused=self._num_refused,
            num_flights_joined=self._flight.num_joined if self._flight else 0,
            num_flights_in_vain=self._flight.num_in_vain if self._flight else 0,
            num_moves_dropped=self._mover.num_dropped if self._mover else 0,
            tiers={tier.name: tier.stats() for tier in self._tiers},
        )

    def find(self, keys: Sequence[PageKey], *, timeout_s: float) -> Future[int]:
        """See ``PageStore``."""
        deadline = time.monotonic() + timeout_s
        chain = tuple(keys)
        return self._ask(lambda: self._loader.find(chain, deadline), deadline)

    def settle(self, keys: Sequence[PageKey], *, timeout_s: float) -> Future[int]:
        """See ``PageStore``."""
        deadline = time.monotonic() + timeout_s
        chain = tuple(keys)
        return self._ask(lambda: self._settle(chain, deadline), deadline)

    def clear(self, namespace_id: bytes, *, timeout_s: float) -> Future[int]:
        """See ``PageStore``."""

        async def drop() -> int:
            return sum(
                await asyncio.gather(*(tier.drop_namespace(namespace_id) for tier in self._tiers))
            )

        return self._ask(drop, time.monotonic() + timeout_s)

    def wait_until_written(self, timeout_s: float) -> bool:
        """See ``PageStore``."""
        return self._queue.wait_until_empty(timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """See ``PageStore``."""
        ends_at = time.monotonic() + timeout_s
        if not self.wait_until_written(timeout_s):
            return False
        return self._mover is None or self._mover.wait_until_idle(ends_at - time.monotonic())

    def close(self) -> None:
        """See ``PageStore``."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._queue.wait_until_empty(self._close_timeout_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._codec_threads.shutdown()
        self._owned.close()

    async def _settle(self, keys: Sequence[PageKey], deadline: float) -> int:
        left_s = max(0.0, deadline - time.monotonic())
        try:
            async with asyncio.timeout(_WRITING_SHARE * left_s):
                await self._writer.until_written(keys)
        except TimeoutError:
            logger.debug("not all of %d pages were written in time", len(keys))
        return await self._loader.find_shared(keys)

    def _ask(
        self, count: Callable[[], Coroutine[object, object, int]], deadline: float
    ) -> Future[int]:
        """Count something on the IO thread; nothing, if that fails or takes too long."""
        future: Future[int] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._is_closed or len(self._questions) >= self._max_pending_loads:
                future.set_result(0)
                return future
            self._questions.add(future)
            self._loop.call_soon_threadsafe(
                lambda: self._spawn(self._loop.create_task(self._count(count, deadline, future)))
            )
        return future

    async def _count(
        self,
        count: Callable[[], Coroutine[object, object, int]],
        deadline: float,
        future: Future[int],
    ) -> None:
        """One question's task; answers whatever happens."""
        number = 0
        try:
            async with asyncio.timeout_at(deadline):
                number = await count()
        except TimeoutError:
            logger.debug("the KV tiers did not answer a question in time")
        except Exception:
            logger.exception("a question to the KV tiers failed")
        finally:
            self._answer(future, number)

    def _answer(self, future: Future[int], number: int) -> None:
        with self._lock:
            self._questions.discard(future)
        future.set_result(number)

    def _run_loop(self) -> None:
        """The IO thread."""
        asyncio.set_event_loop(self._loop)
        for tier in self._tiers:
            self._loop.call_soon(tier.start)
        self._spawn(self._loop.create_task(self._writer.run(), name="kv-write-back"))
        if self._mover is not None:
            self._spawn(self._loop.create_task(self._mover.run(), name="kv-moves"))
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._shut_down())
        finally:
            self._loop.close()
            for future in list(self._pending):
                self._resolve(future, [])
            for question in list(self._questions):
                self._answer(question, 0)

    async def _shut_down(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for tier in self._tiers:
            try:
                async with asyncio.timeout(_SHUTDOWN_S):
                    await tier.aclose()
            except TimeoutError:
                logger.warning("KV tier %s did not close within %s s", tier.name, _SHUTDOWN_S)
            except Exception:
                logger.exception("KV tier %s did not close", tier.name)

    async def _load(self, asked: _Load) -> None:
        """One load's task; resolves its future whatever happens."""
        keys = asked.keys
        loaded: list[LoadedPage] = []
        try:
            with kv_span("load", (asked.traceparent,), pages_asked=len(keys)) as span:
                try:
                    async with asyncio.timeout_at(asked.deadline):
                        await self._loader.load(keys, loaded, asked.deadline, asked.into)
                except TimeoutError:
                    describe(span, is_late=True)
                tiers = sorted({page.tier for page in loaded})
                describe(span, pages_loaded=len(loaded), tiers=tiers)
        except Exception:
            logger.exception("a load of %d pages failed after %d", len(keys), len(loaded))
        finally:
            if self._mover is not None:
                self._mover.served(keys[: len(loaded)], [page.tier for page in loaded])
            self._resolve(asked.future, loaded)

    def _resolve(self, future: Future[LoadedPages], loaded: Sequence[LoadedPage]) -> None:
        with self._lock:
            self._pending.discard(future)
            self._num_loaded += len(loaded)
        future.set_result(
            LoadedPages(tuple(page.page for page in loaded), tuple(page.tier for page in loaded))
        )

    def _spawn(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
