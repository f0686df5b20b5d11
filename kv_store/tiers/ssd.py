"""The warm tier: a segment log on a local disk, with blocking IO in threads of its own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from kv_store.errors import TierUnavailableError
from kv_store.tiers.base import Blob, KVTier, TierUsage
from kv_store.tiers.folder_lock import ClaimedFolder, claim_folder
from kv_store.tiers.segment_log import SegmentLog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kv_store.keys import PageKey

T = TypeVar("T")


class SsdTier(KVTier):
    """Keeps pages over restarts. The folder is claimed and scanned on first use.

    One thread writes, a few read. A file system that refuses (full, read-only, gone) raises
    ``TierUnavailableError``; an opening that failed is tried again by the next operation.
    """

    def __init__(
        self,
        root: Path,
        *,
        budget_bytes: int,
        segment_bytes: int,
        num_read_threads: int,
        name: str = "ssd",
    ) -> None:
        """Prepare; the disk is not touched yet.

        Args:
            root: holds one sub-folder per process that uses it at once.
            budget_bytes: of this process's sub-folder.
            segment_bytes: bytes of one segment file, the unit of reclaim.
            num_read_threads: reads under way at once.
            name: see ``KVTier``.
        """
        self.name = name
        self._root = root
        self._budget_bytes = budget_bytes
        self._segment_bytes = segment_bytes
        self._num_read_threads = num_read_threads
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-ssd-write")
        # Held while the thread works. Turns are waited for on the event loop, where those who give
        # up leave nothing behind: a disk that hangs does not fill the memory with pages.
        self._writing = asyncio.Lock()
        self._readers = ThreadPoolExecutor(num_read_threads, thread_name_prefix="kv-ssd-read")
        self._log: SegmentLog | None = None
        self._folder: ClaimedFolder | None = None
        self._is_closed = False
        self.on_put: Callable[[Sequence[PageKey]], object] | None = None
        """Told, on the event loop, of pages that are held from now on."""

    @property
    def log(self) -> SegmentLog | None:
        """The open log, whose reads any thread may use; None before the first operation."""
        return self._log

    async def opened(self) -> SegmentLog:
        """The log; claims and scans the folder if this is its first use.

        Raises:
            TierUnavailableError: the file system refuses, or the tier is closed.
        """
        self._check_open()
        if self._log is not None:
            return self._log
        return await self._write(self._open_log)

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``; answered from memory."""
        log = await self.opened()
        return [log.contains(key) for key in keys]

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``."""
        log = await self.opened()
        blobs: list[Blob | None] = [None] * len(keys)
        # Each thread takes the next page once it has read one: handing over page by page costs more
        # than reading small ones, and a share fixed beforehand leaves the faster thread idle.
        rest = iter(enumerate(keys))
        num_threads = min(self._num_read_threads, len(keys))
        read = partial(_read_rest, log, rest, blobs)
        await asyncio.gather(*(self._in_thread(self._readers, read) for _ in range(num_threads)))
        return blobs

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """See ``KVTier``; refuses a blob larger than a segment."""
        log = await self.opened()
        held = await self._write(lambda: [log.append(key, blob) for key, blob in items])
        held = [ok and log.contains(key) for ok, (key, _) in zip(held, items, strict=True)]
        if self.on_put is not None:
            self.on_put([key for ok, (key, _) in zip(held, items, strict=True) if ok])
        return held

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """See ``KVTier``; also forgotten after a restart."""
        log = await self.opened()
        return await self._write(lambda: sum(log.delete(key) for key in keys))

    async def delete_namespace(self, namespace_id: bytes) -> int:
        """See ``KVTier``; this process's sub-folder alone."""
        log = await self.opened()
        return await self._write(lambda: sum(log.delete(key) for key in log.keys_of(namespace_id)))

    async def aclose(self) -> None:
        """Close the files and let another process claim the folder."""
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(self._writer, self._close_log)
        self._writer.shutdown(wait=False)
        self._readers.shutdown(wait=False)

    def usage(self) -> TierUsage:
        """Blobs held, and bytes of all files; unknown before the first use."""
        return self._log.usage() if self._log else TierUsage()

    def _open_log(self) -> SegmentLog:
        """On the writer's only thread, so that it happens once."""
        if self._log is None:
            if self._folder is None:
                self._folder = claim_folder(self._root)
            self._log = SegmentLog(
                self._folder.path,
                budget_bytes=self._budget_bytes,
                segment_bytes=self._segment_bytes,
            )
        return self._log

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._folder is not None:
            self._folder.release()

    def _check_open(self) -> None:
        if self._is_closed:
            raise TierUnavailableError(f"tier {self.name} is closed")

    async def _write(self, operation: Callable[[], T]) -> T:
        """On the writer's thread, after those who asked before."""
        await self._writing.acquire()
        try:
            self._check_open()
            job = asyncio.get_running_loop().run_in_executor(self._writer, operation)
        except BaseException:
            self._writing.release()
            raise
        job.add_done_callback(self._written)
        try:
            return await asyncio.shield(job)
        except OSError as exc:
            raise TierUnavailableError(f"{type(exc).__name__}: {exc}") from exc

    def _written(self, job: asyncio.Future[T]) -> None:
        self._writing.release()
        if not job.cancelled():
            job.exception()  # seen, though nobody may be waiting any more

    async def _in_thread(self, threads: ThreadPoolExecutor, operation: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, operation)
        except OSError as exc:
            raise TierUnavailableError(f"{type(exc).__name__}: {exc}") from exc


def _read_rest(
    log: SegmentLog, rest: Iterator[tuple[int, PageKey]], blobs: list[Blob | None]
) -> None:
    for index, key in rest:
        blobs[index] = log.read(key)
