"""An append-only log of records in segment files, with its index in memory.

Records (``segment_records``) of one file follow each other without gaps. A start reads all headers,
and in each file stops at the first that does not hold: a torn tail is cut off. Nothing is synced,
since a cache may lose; a blob whose bytes never reached the disk is found out by the page's own
checksum.

Space is reclaimed a whole file at a time, oldest first. Pages of that file that were read since
they were written move to the log's end, those read most often first, up to a quarter of a file; a
move costs a page one of its reads. So what is used stays and what was read once leaves at last,
without the bookkeeping of an order of use (after Yang et al., S3-FIFO, SOSP 2023).
"""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kv_store.tiers.base import Blob, TierUsage
from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.direct_io import DirectIO
from kv_store.tiers.segment_records import (
    DELETED,
    RECORD_HEADER_BYTES,
    pack_record,
    parse_header,
    read_records,
    record_bytes,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kv_store.keys import PageKey

_MAX_READS = 3
_MOVED_SHARE = 4


class _Location(NamedTuple):
    segment: int
    offset: int
    length: int


@dataclass(slots=True)
class _Segment:
    path: Path
    num_bytes: int = 0
    keys: list[PageKey] = field(default_factory=list)


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
        self._budget_bytes = budget_bytes
        self._segment_bytes = segment_bytes
        self._io = DirectIO()
        self._buffers = BufferPool()
        self._lock = threading.Lock()  # guards the four below; never held during IO
        self._index: dict[PageKey, _Location] = {}
        self._num_reads: dict[PageKey, int] = {}  # since written, up to a bound
        self._segments: dict[int, _Segment] = {}  # in order of age
        self._num_bytes = 0
        self._active_fd: int | None = None
        self._next_segment = 0
        for path in sorted(folder.glob("segment-*.log")):
            self._load_segment(path)
        self._reclaim(0)

    def contains(self, key: PageKey) -> bool:
        """Whether the key is held; no IO."""
        with self._lock:
            return key in self._index

    def read(self, key: PageKey) -> Blob | None:
        """The key's blob, or None.

        Raises:
            OSError: the file system refuses.
        """
        with self._lock:
            location = self._index.get(key)
            if location is None:
                return None
            path = self._segments[location.segment].path
            self._num_reads[key] = min(_MAX_READS, self._num_reads.get(key, 0) + 1)
        return self._read_record(path, key, location)

    def append(self, key: PageKey, blob: Blob) -> bool:
        """Write a blob and then publish it. False if it can never fit.

        Raises:
            OSError: the file system refuses; the log is as it was.
        """
        if self.contains(key):
            return True
        if record_bytes(len(blob)) > self._segment_bytes:
            return False
        number, offset = self._write(key, blob, flags=0)
        with self._lock:
            self._index[key] = _Location(number, offset, len(blob))
            self._segments[number].keys.append(key)
        return True

    def delete(self, key: PageKey) -> bool:
        """Forget a key, now and after a restart. Whether it was held.

        Raises:
            OSError: it is forgotten, but may come back after a restart.
        """
        with self._lock:
            if self._index.pop(key, None) is None:
                return False
            self._num_reads.pop(key, None)
        self._write(key, b"", flags=DELETED)
        return True

    def usage(self) -> TierUsage:
        """Blobs held, and bytes of all files."""
        with self._lock:
            return TierUsage(len(self._index), self._num_bytes)

    def close(self) -> None:
        """Close the file that is being written. Idempotent."""
        if self._active_fd is not None:
            os.close(self._active_fd)
            self._active_fd = None

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

    def _write(self, key: PageKey, blob: Blob, *, flags: int) -> tuple[int, int]:
        """Append one record, once there is room; returns its segment and offset."""
        self._reclaim(record_bytes(len(blob)))
        return self._write_record(key, blob, flags=flags)

    def _write_record(self, key: PageKey, blob: Blob, *, flags: int) -> tuple[int, int]:
        size = record_bytes(len(blob))
        fd = self._active_fd
        if fd is None or self._segments[self._active].num_bytes + size > self._segment_bytes:
            fd = self._roll()
        segment = self._segments[self._active]
        record = self._buffers.take(size)
        pack_record(record, key, blob, flags=flags)
        offset = segment.num_bytes
        try:
            num_written = self._io.write(fd, record, offset)
        except OSError:
            self._abandon(segment, offset)
            raise
        if num_written != size:
            self._abandon(segment, offset)
            raise OSError(errno.ENOSPC, "the file system took only a part of a record")
        with self._lock:
            segment.num_bytes += size
            self._num_bytes += size
        return self._active, offset

    @property
    def _active(self) -> int:
        return self._next_segment - 1

    def _abandon(self, segment: _Segment, num_bytes: int) -> None:
        """Keep only the first ``num_bytes`` of the active file, and write no more to it.

        A start would not look behind a torn record, so nothing may follow one.
        """
        number = self._active
        self.close()
        if num_bytes > 0:
            os.truncate(segment.path, num_bytes)
            return
        with self._lock:
            del self._segments[number]
        segment.path.unlink(missing_ok=True)

    def _roll(self) -> int:
        """Begin a new segment file."""
        self.close()
        path = self._folder / f"segment-{self._next_segment:010}.log"
        fd = self._active_fd = self._io.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with self._lock:
            self._segments[self._next_segment] = _Segment(path)
            self._next_segment += 1
        return fd

    def _reclaim(self, num_wanted: int) -> None:
        """Remove the oldest files until the budget has room."""
        while self._segments and self._num_bytes + num_wanted > self._budget_bytes:
            number = next(iter(self._segments))
            segment = self._segments[number]
            with self._lock:
                self._num_bytes -= segment.num_bytes
            if number == self._active:
                self.close()
            else:
                self._move_read_pages(number, segment)
            segment.path.unlink(missing_ok=True)  # a reader that comes late finds a miss
            with self._lock:
                del self._segments[number]
                for key in segment.keys:
                    location = self._index.get(key)
                    if location is not None and location.segment == number:
                        del self._index[key]
                        self._num_reads.pop(key, None)

    def _move_read_pages(self, number: int, segment: _Segment) -> None:
        """Append what was read of a file that is about to go."""
        with self._lock:
            candidates = [
                (self._num_reads[key], key, location)
                for key in dict.fromkeys(segment.keys)
                if key in self._num_reads
                and (location := self._index.get(key)) is not None
                and location.segment == number
            ]
        candidates.sort(key=lambda candidate: -candidate[0])
        room = self._segment_bytes // _MOVED_SHARE
        for num_reads, key, location in candidates:
            size = record_bytes(location.length)
            if size > room:
                continue
            try:
                blob = self._read_record(segment.path, key, location)
                if blob is None:
                    continue
                new_number, offset = self._write_record(key, blob, flags=0)
            except OSError:
                return  # a cache may lose; the write that needs the room will say what is wrong
            room -= size
            with self._lock:
                self._index[key] = _Location(new_number, offset, location.length)
                self._segments[new_number].keys.append(key)
                self._num_reads[key] = num_reads - 1
                if num_reads == 1:
                    del self._num_reads[key]

    def _forget(self, key: PageKey, location: _Location) -> None:
        with self._lock:
            if self._index.get(key) == location:
                del self._index[key]
                self._num_reads.pop(key, None)

    def _load_segment(self, path: Path) -> None:
        """Read one file's headers; cut off its torn tail."""
        number = int(path.stem.removeprefix("segment-"))
        segment = _Segment(path)
        file_bytes = path.stat().st_size
        for record in read_records(path):
            if record.is_deleted:
                self._index.pop(record.key, None)
            else:
                self._index[record.key] = _Location(number, record.offset, record.length)
                segment.keys.append(record.key)
            segment.num_bytes = record.offset + record_bytes(record.length)
        self._next_segment = number + 1
        if segment.num_bytes == 0:
            path.unlink()
            return
        if segment.num_bytes < file_bytes:
            os.truncate(path, segment.num_bytes)
        self._segments[number] = segment
        self._num_bytes += segment.num_bytes
