"""Saving pages behind the engine's back: a bounded queue, and the task that empties it."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from kv_store.page_format import encode_page
from kv_store.spans import describe, kv_span

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    import numpy as np
    from numpy.typing import NDArray

    from kv_store.codecs.base import Codec
    from kv_store.keys import PageKey
    from kv_store.layout import PageLayout
    from kv_store.tiers.base import Blob
    from kv_store.tiers.guarded import GuardedTier

logger = logging.getLogger(__name__)


class PendingWrite(NamedTuple):
    """A page to be written.

    Attributes:
        traceparent: of the request that computed it, if that is traced.
    """

    key: PageKey
    page: NDArray[np.uint8]
    traceparent: str | None = None

    @property
    def num_bytes(self) -> int:
        """Memory it holds."""
        return self.page.nbytes


class WriteBackQueue:
    """Bounded by pages and by bytes, both counted until written. Thread-safe; never blocks."""

    def __init__(self, *, max_pages: int, max_bytes: int) -> None:
        self._max_pages = max_pages
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._waiting: deque[PendingWrite] = deque()
        self._unfinished: dict[PageKey, int] = {}
        self._num_bytes = 0
        self._num_dropped = 0

    @property
    def num_queued(self) -> int:
        """Pages waiting or being written."""
        return len(self._unfinished)

    @property
    def num_dropped(self) -> int:
        """Pages refused because the queue was full."""
        return self._num_dropped

    def put(self, write: PendingWrite) -> bool:
        """Queue a page; one that is queued already is not queued again. False if full."""
        with self._changed:
            if write.key in self._unfinished:
                return True
            if (
                len(self._unfinished) >= self._max_pages
                or self._num_bytes + write.num_bytes > self._max_bytes
            ):
                self._num_dropped += 1
                return False
            self._waiting.append(write)
            self._unfinished[write.key] = write.num_bytes
            self._num_bytes += write.num_bytes
            return True

    def take(self, max_pages: int) -> list[PendingWrite]:
        """The oldest pages; call ``finish`` for each."""
        with self._changed:
            return [self._waiting.popleft() for _ in range(min(max_pages, len(self._waiting)))]

    def finish(self, writes: Sequence[PendingWrite]) -> None:
        """These were written, or given up."""
        with self._changed:
            for write in writes:
                self._num_bytes -= self._unfinished.pop(write.key)
            self._changed.notify_all()

    def holds_any(self, keys: Sequence[PageKey]) -> bool:
        """Whether one of these is waiting or being written."""
        with self._changed:
            return any(key in self._unfinished for key in keys)

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Whether everything was finished in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._unfinished, timeout_s)


class PageWriter:
    """Encodes queued pages and puts them into every tier that lacks them. On the event loop."""

    def __init__(
        self,
        *,
        queue: WriteBackQueue,
        tiers: Sequence[GuardedTier],
        layout: PageLayout,
        codec: Codec,
        codec_threads: Executor,
        batch_pages: int,
        on_written: Callable[[PageKey, Sequence[GuardedTier]], object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Wire up.

        Args:
            queue: what to write.
            tiers: all of them get every page.
            layout: of every page.
            codec: packs pages.
            codec_threads: encode here, off the event loop.
            batch_pages: pages written together.
            on_written: told of each page that was written, and of the tiers that hold it.
            clock: Unix seconds, for the creation time in each page.
        """
        self._queue = queue
        self._tiers = tiers
        self._layout = layout
        self._codec = codec
        self._codec_threads = codec_threads
        self._batch_pages = batch_pages
        self._on_written = on_written
        self._clock = clock
        self._wake = asyncio.Event()
        self._has_finished = asyncio.Event()
        self.num_saved = 0
        self.num_failed = 0

    def wake(self) -> None:
        """Something was queued. On the event loop only."""
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while batch := self._queue.take(self._batch_pages):
                try:
                    with kv_span("save", [write.traceparent for write in batch]) as span:
                        describe(span, pages=len(batch))
                        await self._write(batch)
                except Exception:
                    self.num_failed += len(batch)
                    logger.exception("%d pages were not written", len(batch))
                finally:
                    self._queue.finish(batch)
                    self._has_finished.set()

    async def until_written(self, keys: Sequence[PageKey]) -> None:
        """Return once none of these is queued: each was written, given up, or never came here."""
        while self._queue.holds_any(keys):
            self._has_finished.clear()
            await self._has_finished.wait()

    async def _write(self, batch: Sequence[PendingWrite]) -> None:
        tiers = [tier for tier in self._tiers if tier.is_writable]
        keys = [write.key for write in batch]
        present = await asyncio.gather(*(tier.contains(keys) for tier in tiers))
        missing = [
            write
            for index, write in enumerate(batch)
            if not tiers or not all(held[index] for held in present)
        ]
        if not tiers:
            self.num_failed += len(missing)
            return
        loop = asyncio.get_running_loop()
        blobs = await asyncio.gather(
            *(loop.run_in_executor(self._codec_threads, self._encode, write) for write in missing)
        )
        ready = {write.key: blob for write, blob in zip(missing, blobs, strict=True)}

        async def put(tier: GuardedTier, held: list[bool]) -> set[PageKey]:
            items = [
                (key, ready[key])
                for key, is_held in zip(keys, held, strict=True)
                if not is_held and key in ready
            ]
            if not items:
                return set()
            with kv_span("put", tier=tier.name, pages=len(items)) as span:
                accepted = await tier.put(items)
                describe(
                    span,
                    pages_taken=accepted.count(True),
                    bytes=sum(len(blob) for _, blob in items),
                )
            return {key for (key, _), ok in zip(items, accepted, strict=True) if ok}

        accepted = await asyncio.gather(*map(put, tiers, present))
        written = set().union(*accepted)
        self.num_saved += len(written)
        self.num_failed += len(ready) - len(written)
        if self._on_written is None:
            return
        for index, key in enumerate(keys):
            holders = [
                tier
                for tier, held, new in zip(tiers, present, accepted, strict=True)
                if held[index] or key in new
            ]
            self._on_written(key, holders)

    def _encode(self, write: PendingWrite) -> Blob:
        created_ms = int(self._clock() * 1000)
        return encode_page(write.key, write.page, self._layout, self._codec, created_ms=created_ms)
