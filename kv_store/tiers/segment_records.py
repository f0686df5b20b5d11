"""Records of a segment file as bytes, and a walk over them that changes nothing.

record = header (128 bytes) || blob || zeros up to a multiple of 4 KiB

offset  size  type     header field
0       4     bytes    magic "KVR1"
4       2     u16      flags: 1 = deleted since; the blob is no longer there, its room is
6       2     u16      reserved, 0
8       4     u32      index of the page in its chain
12      4     u32      bytes of the blob, or of its room
16      16    bytes    namespace id
32      32    bytes    page hash
64      60    -        reserved, 0
124     4     u32      CRC32 of the first 124 bytes
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from typing import TYPE_CHECKING, NamedTuple

from kv_store.keys import PageKey

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kv_store.tiers.base import Blob

ALIGNMENT = 4096
RECORD_HEADER_BYTES = 128

_DELETED = 1
_MAGIC = b"KVR1"
_HEADER = struct.Struct("<4sHHII16s32s60x")
_CRC = struct.Struct("<I")
_FILE_NAME = re.compile(r"segment-([0-9]{10})(-main)?\.log")


class SegmentName(NamedTuple):
    """What the name of a segment file says."""

    number: int
    is_main: bool

    @property
    def file_name(self) -> str:
        """As on disk."""
        return f"segment-{self.number:010}{'-main' if self.is_main else ''}.log"


class RecordHeader(NamedTuple):
    """What a record says about itself."""

    key: PageKey
    is_deleted: bool
    length: int


class Record(NamedTuple):
    """A record of a file; its blob follows the header at ``offset``."""

    key: PageKey
    is_deleted: bool
    length: int
    path: Path
    offset: int

    def read_blob(self) -> bytes:
        """The blob; shorter if the file ends, and of another key if the file has changed.

        Raises:
            OSError: the file system refuses, or the file is gone.
        """
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + RECORD_HEADER_BYTES)
            return file.read(self.length)


def segment_files(folder: Path) -> list[tuple[SegmentName, Path]]:
    """The segment files of a folder by number; what else lies there is somebody else's."""
    found = ((_FILE_NAME.fullmatch(path.name), path) for path in folder.glob("segment-*.log"))
    return sorted(
        (SegmentName(int(match[1]), match[2] is not None), path)
        for match, path in found
        if match is not None
    )


def record_bytes(blob_bytes: int) -> int:
    """Bytes of the record of a blob, on disk."""
    return -(-(RECORD_HEADER_BYTES + blob_bytes) // ALIGNMENT) * ALIGNMENT


def pack_record(target: memoryview, key: PageKey, blob: Blob) -> None:
    """Fill a whole record.

    Args:
        target: [record_bytes(len(blob))].
        key: the page's.
        blob: what is stored.
    """
    end = RECORD_HEADER_BYTES + len(blob)
    _pack_header(target, key, len(blob), flags=0)
    target[RECORD_HEADER_BYTES:end] = blob
    target[end:] = bytes(len(target) - end)


def pack_deleted(target: memoryview, key: PageKey, length: int) -> None:
    """Fill what takes the place of a deleted record's beginning.

    Args:
        target: [ALIGNMENT].
        key: the page's.
        length: of the blob that was there, so that the next record is still found.
    """
    _pack_header(target, key, length, flags=_DELETED)
    target[RECORD_HEADER_BYTES:] = bytes(len(target) - RECORD_HEADER_BYTES)


def _pack_header(target: memoryview, key: PageKey, length: int, *, flags: int) -> None:
    _HEADER.pack_into(target, 0, _MAGIC, flags, 0, key.index, length, *key[:2])
    _CRC.pack_into(target, _HEADER.size, zlib.crc32(target[: _HEADER.size]))


def parse_header(record: bytes | memoryview) -> RecordHeader | None:
    """The header a record begins with; None if it does not hold."""
    if len(record) < RECORD_HEADER_BYTES:
        return None
    (checksum,) = _CRC.unpack_from(record, _HEADER.size)
    if record[:4] != _MAGIC or checksum != zlib.crc32(memoryview(record)[: _HEADER.size]):
        return None
    _, flags, _, index, length, namespace_id, page_hash = _HEADER.unpack_from(record)
    return RecordHeader(PageKey(namespace_id, page_hash, index), bool(flags & _DELETED), length)


def read_records(path: Path) -> Iterator[Record]:
    """All records of a file up to its torn tail, in the order written.

    Raises:
        OSError: the file system refuses.
    """
    file_bytes = path.stat().st_size
    offset = 0
    with path.open("rb", buffering=0) as file:
        while offset < file_bytes:
            file.seek(offset)
            header = parse_header(file.read(RECORD_HEADER_BYTES))
            if header is None or offset + record_bytes(header.length) > file_bytes:
                return
            yield Record(*header, path, offset)
            offset += record_bytes(header.length)


def erase(record: Record) -> bool:
    """Delete a page and overwrite its bytes, beside whoever uses the folder; False if it has left.

    Its owner, and every later start, finds a deleted record and so a miss.

    Raises:
        OSError: the file system refuses.
    """
    try:
        file = record.path.open("r+b", buffering=0)
    except FileNotFoundError:
        return False
    with file:
        file.seek(record.offset)
        if parse_header(file.read(RECORD_HEADER_BYTES)) != record[:3]:
            return False  # another file has got this name
        zeros = memoryview(bytearray(record_bytes(record.length)))
        pack_deleted(zeros[:ALIGNMENT], record.key, record.length)
        # First what makes it a miss: what follows would be found corrupt, and be counted.
        for start, end in ((0, ALIGNMENT), (ALIGNMENT, len(zeros))):
            file.seek(record.offset + start)
            file.write(zeros[start:end])
        os.fsync(file.fileno())
    return True


def read_pages(folder: Path) -> dict[PageKey, Record]:
    """The last record of each page that a start would find; the folder may be in use.

    Raises:
        OSError: the file system refuses.
    """
    pages: dict[PageKey, Record] = {}
    for _, path in segment_files(folder):
        try:
            for record in read_records(path):
                pages[record.key] = record
        except FileNotFoundError:
            continue  # reclaimed meanwhile
    return {key: record for key, record in pages.items() if not record.is_deleted}
