"""An append-only log of records in segment files, with its index in memory.

Records (``segment_records``) of one file follow each other without gaps. A start reads all headers,
and in each file stops at the first that does not hold: a torn tail is cut off. Nothing is synced,
since a cache may lose; a blob whose bytes never reached the disk is found out by the page's own
checksum.

Space is reclaimed a whole file at a time; which one, and what of it is written anew, is for
``reclaim`` to say. Files of its two queues are told apart by their names.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, NamedTuple

from kv_store.tiers.base import Blob, TierUsage
from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.direct_io import DirectIO
from kv_store.tiers.reclaim import Queue, ReclaimPolicy
from kv_store.tiers.segment_records import (
    ALIGNMENT,
    RECORD_HEADER_BYTES,
    SegmentName,
    pack_deleted,
    pack_record,
    parse_header,
    read_records,
    record_bytes,
    segment_files,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kv_store.keys import PageKey


_FULL = (errno.ENOSPC, errno.EDQUOT)


class _Location(NamedTuple):
    segment: int
    offset: int
    length: int


class _ActiveFile(NamedTuple):
    segment: int
    fd: int


class SegmentLog:
    """Reads from any thread; ``append``, ``delete`` and ``close`` from one thread at a time."""

    def __init__(self, folder: Path, *, budget_bytes: int, segment_bytes: int) -> None:
        """Open a folder and rebuild the index.

        Args:
            folder: exists, and is this log's alone.
            budget_bytes: of all segment files together.
            segment_bytes: of one file; at most half the budget.

        Raises:
            OSError: the file system refuses.
        """
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._io = DirectIO()
        self._buffers = BufferPool()
        self._lock = threading.Lock()  # guards the three below; never held during IO
        self._policy = ReclaimPolicy(budget_bytes=budget_bytes, segment_bytes=segment_bytes)
        self._index: dict[PageKey, _Location] = {}
        self._paths: dict[int, Path] = {}
        self._active: dict[Queue, _ActiveFile] = {}
        self._next_segment = 0
        for name, path in segment_files(folder):
            self._load_segment(name, path)
        self._reclaim(0)

    def contains(self, key: PageKey) -> bool:
        """Whether the key is held; no IO."""
        with self._lock:
            return key in self._index

    def keys_of(self, namespace_id: bytes) -> list[PageKey]:
        """The keys of one namespace that are held; no IO."""
        with self._lock:
            return [key for key in self._index if key.namespace_id == namespace_id]

    def read(self, key: PageKey) -> Blob | None:
        """The key's blob, or None.

        Raises:
            OSError: the file system refuses.
        """
        with self._lock:
            location = self._index.get(key)
            if location is None:
                return None
            path = self._paths[location.segment]
            self._policy.read(key)
        return self._read_record(path, key, location)

    def append(self, key: PageKey, blob: Blob) -> bool:
        """Write a blob and then publish it. False if it can never fit.

        Raises:
            OSError: the file system refuses; of what was held nothing is lost, unless it is full.
        """
        if self.contains(key):
            return True
        size = record_bytes(len(blob))
        if size > self._segment_bytes:
            return False
        if self._policy.is_cramped:
            disk = os.statvfs(self._folder)
            self._policy.grow(disk.f_bavail * disk.f_frsize)
        self._reclaim(size)
        try:
            self._write(key, blob, self._policy.queue_for(key))
        except OSError as exc:
            # A full disk holds less than the budget: it is used as if that were the budget.
            if exc.errno not in _FULL or not self._policy.num_bytes:
                raise
            self._policy.shrink()
            self._reclaim(size)
            self._write(key, blob, self._policy.queue_for(key))
        return True

    def delete(self, key: PageKey) -> bool:
        """Forget a key, now and after a restart. Whether it was held.

        Raises:
            OSError: it is forgotten, but may come back after a restart.
        """
        with self._lock:
            location = self._index.pop(key, None)
            if location is None:
                return False
            path = self._paths[location.segment]
            self._policy.deleted(key)
        block = self._buffers.take(ALIGNMENT)
        pack_deleted(block, key, location.length)
        try:
            fd = self._io.open(path, os.O_WRONLY)
        except FileNotFoundError:
            return True  # somebody has cleaned up behind our back
        try:
            self._io.write(fd, block, location.offset)
        finally:
            os.close(fd)
        return True

    def keys(self) -> list[PageKey]:
        """All that are held; no IO."""
        with self._lock:
            return list(self._index)

    def usage(self) -> TierUsage:
        """Blobs held, and bytes of all files."""
        with self._lock:
            return TierUsage(len(self._index), self._policy.num_bytes)

    def close(self) -> None:
        """Close the files that are being written. Idempotent."""
        for queue in list(self._active):
            self._close_active(queue)

    def _read_record(self, path: Path, key: PageKey, location: _Location) -> Blob | None:
        """The blob at a place; None, and forgotten, if it is not this key's."""
        record = self._buffers.take(record_bytes(location.length))
        try:
            # By name, not by a shared descriptor: a reclaim may remove the file at any moment.
            fd = self._io.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            num_read = self._io.read(fd, record, location.offset)
        finally:
            os.close(fd)
        header = parse_header(record[:RECORD_HEADER_BYTES])
        if num_read != len(record) or header is None or header[:2] != (key, False):
            self._forget(key, location)
            return None
        return record[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + location.length].toreadonly()

    def _write(self, key: PageKey, blob: Blob, queue: Queue) -> None:
        """Append a page to a queue, and then publish it."""
        size = record_bytes(len(blob))
        active = self._active.get(queue)
        if active is None or (
            self._policy.written_bytes(active.segment) + size > self._policy.segment_bytes
        ):
            active = self._roll(queue)
        number, fd = active
        record = self._buffers.take(size)
        pack_record(record, key, blob)
        offset = self._policy.written_bytes(number)
        try:
            num_written = self._io.write(fd, record, offset)
        except OSError:
            self._abandon(queue, offset)
            raise
        if num_written != size:
            self._abandon(queue, offset)
            raise OSError(errno.ENOSPC, "the file system took only a part of a record")
        with self._lock:
            self._policy.wrote(number, key, size)
            self._index[key] = _Location(number, offset, len(blob))

    def _abandon(self, queue: Queue, num_bytes: int) -> None:
        """Keep only the first ``num_bytes`` of a queue's file, and write no more to it.

        A start would not look behind a torn record, so nothing may follow one.
        """
        number = self._active[queue].segment
        self._close_active(queue)
        if num_bytes > 0:
            os.truncate(self._paths[number], num_bytes)
            return
        with self._lock:
            self._policy.forget(number)
            path = self._paths.pop(number)
        path.unlink(missing_ok=True)

    def _roll(self, queue: Queue) -> _ActiveFile:
        """Begin a new segment file of a queue."""
        self._close_active(queue)
        number = self._next_segment
        path = self._folder / SegmentName(number, queue is Queue.MAIN).file_name
        fd = self._io.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self._next_segment += 1
        active = self._active[queue] = _ActiveFile(number, fd)
        with self._lock:
            self._policy.begin(number, queue)
            self._paths[number] = path
        return active

    def _close_active(self, queue: Queue) -> None:
        active = self._active.pop(queue, None)
        if active is not None:
            os.close(active.fd)

    def _reclaim(self, num_wanted: int) -> None:
        """Remove files until the budget has room."""
        while self._policy.num_bytes + num_wanted > self._policy.budget_bytes:
            number = self._policy.victim()
            if number is None:
                return
            for queue, active in list(self._active.items()):
                if active.segment == number:
                    self._close_active(queue)
            with self._lock:
                survivors = [(key, self._index[key]) for key in self._policy.survivors(number)]
            self._move(self._paths[number], survivors)
            self._paths[number].unlink(missing_ok=True)  # a reader that comes late finds a miss
            with self._lock:
                del self._paths[number]
                for key in self._policy.forget(number):
                    del self._index[key]

    def _move(self, path: Path, pages: Sequence[tuple[PageKey, _Location]]) -> None:
        """Write pages of a file that is about to go once more."""
        for key, location in pages:
            try:
                blob = self._read_record(path, key, location)
                if blob is not None:
                    self._write(key, blob, Queue.MAIN)
            except OSError:
                return  # a cache may lose; the write that needs the room will say what is wrong

    def _forget(self, key: PageKey, location: _Location) -> None:
        with self._lock:
            if self._index.get(key) == location:
                del self._index[key]
                self._policy.deleted(key)

    def _load_segment(self, name: SegmentName, path: Path) -> None:
        """Read one file's headers; cut off its torn tail."""
        number = name.number
        file_bytes = path.stat().st_size
        self._next_segment = number + 1
        self._policy.begin(number, Queue.MAIN if name.is_main else Queue.PROBATION)
        for record in read_records(path):
            self._policy.wrote(number, record.key, record_bytes(record.length))
            if record.is_deleted:
                self._policy.deleted(record.key)
                self._index.pop(record.key, None)
            else:
                self._index[record.key] = _Location(number, record.offset, record.length)
        num_bytes = self._policy.written_bytes(number)
        if num_bytes == 0:
            self._policy.forget(number)
            path.unlink()
            return
        if num_bytes < file_bytes:
            os.truncate(path, num_bytes)
        self._paths[number] = path
