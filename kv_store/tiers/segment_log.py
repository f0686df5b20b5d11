"""An append-only log of records in segment files, with its index in memory.

    record = header (128 bytes) || blob || zeros up to a multiple of 4 KiB

    offset  size  type     header field
    0       4     bytes    magic "KVR1"
    4       2     u16      flags: 1 = the key was deleted here, no blob follows
    6       2     u16      reserved, 0
    8       4     u32      index of the page in its chain
    12      4     u32      blob bytes
    16      16    bytes    namespace id
    32      32    bytes    page hash
    64      60    -        reserved, 0
    124     4     u32      CRC32 of the first 124 bytes

Records of one file follow each other without gaps. A start reads all headers, and in each file
stops at the first that does not hold: a torn tail is cut off. Nothing is synced, since a cache may
lose; a blob whose bytes never reached the disk is found out by the page's own checksum. Space is
reclaimed a whole file at a time, oldest first.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kv_store.keys import PageKey
from kv_store.tiers.base import Blob, TierUsage

if TYPE_CHECKING:
    from pathlib import Path

ALIGNMENT = 4096
RECORD_HEADER_BYTES = 128

_MAGIC = b"KVR1"
_DELETED = 1
_HEADER = struct.Struct("<4sHHII16s32s60x")
_CRC = struct.Struct("<I")


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
        self._lock = threading.Lock()  # guards the three below; never held during IO
        self._index: dict[PageKey, _Location] = {}
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
            path = self._segments[location.segment].path if location else None
        if location is None or path is None:
            return None
        record = bytearray(RECORD_HEADER_BYTES + location.length)
        try:
            # By name, not by a shared descriptor: a reclaim may remove the file at any moment.
            with path.open("rb", buffering=0) as file:
                file.seek(location.offset)
                num_read = file.readinto(record)
        except FileNotFoundError:
            return None
        header = _parse(record)
        if num_read != len(record) or header is None or header[:2] != (key, False):
            self._forget(key, location)
            return None
        return memoryview(record)[RECORD_HEADER_BYTES:].toreadonly()

    def append(self, key: PageKey, blob: Blob) -> bool:
        """Write a blob and then publish it. False if it can never fit.

        Raises:
            OSError: the file system refuses; the log is as it was.
        """
        if self.contains(key):
            return True
        if _record_bytes(len(blob)) > self._segment_bytes:
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
        self._write(key, b"", flags=_DELETED)
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

    def _write(self, key: PageKey, blob: Blob, *, flags: int) -> tuple[int, int]:
        """Append one record; returns its segment and offset."""
        size = _record_bytes(len(blob))
        self._reclaim(size)
        fd = self._active_fd
        if fd is None or self._segments[self._active].num_bytes + size > self._segment_bytes:
            fd = self._roll()
        segment = self._segments[self._active]
        head = _HEADER.pack(_MAGIC, flags, 0, key.index, len(blob), *key[:2])
        head += _CRC.pack(zlib.crc32(head))
        padding = bytes(size - RECORD_HEADER_BYTES - len(blob))
        offset = segment.num_bytes
        try:
            num_written = os.pwritev(fd, [head, blob, padding], offset)
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
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = self._active_fd = os.open(path, flags, 0o600)
        with self._lock:
            self._segments[self._next_segment] = _Segment(path)
            self._next_segment += 1
        return fd

    def _reclaim(self, num_wanted: int) -> None:
        """Remove the oldest files until the budget has room."""
        while self._segments and self._num_bytes + num_wanted > self._budget_bytes:
            number = next(iter(self._segments))
            if number == self._active:
                self.close()
            segment = self._segments[number]
            segment.path.unlink(missing_ok=True)  # a reader that comes late finds a miss
            with self._lock:
                del self._segments[number]
                self._num_bytes -= segment.num_bytes
                for key in segment.keys:
                    location = self._index.get(key)
                    if location is not None and location.segment == number:
                        del self._index[key]

    def _forget(self, key: PageKey, location: _Location) -> None:
        with self._lock:
            if self._index.get(key) == location:
                del self._index[key]

    def _load_segment(self, path: Path) -> None:
        """Read one file's headers; cut off its torn tail."""
        number = int(path.stem.removeprefix("segment-"))
        segment = _Segment(path)
        file_bytes = path.stat().st_size
        with path.open("rb", buffering=0) as file:
            while segment.num_bytes < file_bytes:
                file.seek(segment.num_bytes)
                header = _parse(file.read(RECORD_HEADER_BYTES))
                if header is None:
                    break
                key, is_deleted, length = header
                size = _record_bytes(length)
                if segment.num_bytes + size > file_bytes:
                    break
                if is_deleted:
                    self._index.pop(key, None)
                else:
                    self._index[key] = _Location(number, segment.num_bytes, length)
                    segment.keys.append(key)
                segment.num_bytes += size
        self._next_segment = number + 1
        if segment.num_bytes == 0:
            path.unlink()
            return
        if segment.num_bytes < file_bytes:
            os.truncate(path, segment.num_bytes)
        self._segments[number] = segment
        self._num_bytes += segment.num_bytes


def _record_bytes(blob_bytes: int) -> int:
    return -(-(RECORD_HEADER_BYTES + blob_bytes) // ALIGNMENT) * ALIGNMENT


def _parse(record: bytes | bytearray) -> tuple[PageKey, bool, int] | None:
    """Key, whether it was deleted here, and blob length; None if the header does not hold."""
    if len(record) < RECORD_HEADER_BYTES:
        return None
    (checksum,) = _CRC.unpack_from(record, _HEADER.size)
    if record[:4] != _MAGIC or checksum != zlib.crc32(memoryview(record)[: _HEADER.size]):
        return None
    _, flags, _, index, length, namespace_id, page_hash = _HEADER.unpack_from(record)
    return PageKey(namespace_id, page_hash, index), bool(flags & _DELETED), length
