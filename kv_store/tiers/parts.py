"""Large blobs as several values: servers slow down, and fragment, beyond a few megabytes each.

The blob's name then holds a manifest, and each part a name of its own:

    manifest = "KVM1" || u32 LE number of parts || u64 LE digest || u32 LE bytes of each part
               || first bytes of the blob

The first bytes are those before the first part: a page's header and section table, so that whoever
reads the manifest knows what the parts hold. Of a blob that nobody can look into, such as a sealed
page, they are its first 128. Parts are cut where the blob's owner says (a page's layer groups), and
only a longer stretch is cut elsewhere.

The digest is the xxh3-64 of all that follows it. Names of parts contain it, so that two blobs of
one name never mix their parts, were they written at once or one after the other: the first bytes
tell them apart, by a page's checksum or a seal's nonce. A manifest that the digest does not fit is
no manifest but a damaged blob, which its reader will find out.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import xxhash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_store.tiers.base import Blob

MAGIC = b"KVM1"
_HEADER = struct.Struct("<4sIQ")
_LENGTH = struct.Struct("<I")
_MAX_PARTS = 4096
_MAX_BLOB_BYTES = 1 << 30
_HEAD_BYTES = 128


class Manifest(NamedTuple):
    """What is written under the blob's own name.

    Attributes:
        head: the blob's first bytes, by which blobs of one name differ.
        lengths: bytes of each part that follows.
    """

    head: bytes
    lengths: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of the whole blob."""
        return len(self.head) + sum(self.lengths)

    @property
    def digest(self) -> int:
        """Differs for every other manifest."""
        return xxhash.xxh3_64_intdigest(self._body)

    @property
    def _body(self) -> bytes:
        return struct.pack(f"<{len(self.lengths)}I", *self.lengths) + self.head

    def pack(self) -> bytes:
        """As stored."""
        return _HEADER.pack(MAGIC, len(self.lengths), self.digest) + self._body

    def part_names(self, name: bytes) -> list[bytes]:
        """Names of the parts of the blob that is called ``name``; in a cluster, beside it."""
        digest = self.digest
        return [b"%b:%016x:%d" % (name, digest, number) for number in range(len(self.lengths))]


def is_split(blob: Blob, max_bytes: int) -> bool:
    """Whether a blob must be stored in parts: too long, or it looks like a manifest itself."""
    return len(blob) > max_bytes or bytes(blob[: len(MAGIC)]) == MAGIC


def split(blob: Blob, cuts: Sequence[int], max_bytes: int) -> tuple[Manifest, list[memoryview]]:
    """The manifest, and the parts as views.

    Args:
        blob: what to store.
        cuts: offsets where a part may begin, ascending; the first ends the manifest's share, which
            without cuts is 128 bytes.
        max_bytes: of one part.
    """
    view = memoryview(blob)
    inner = sorted({cut for cut in cuts if 0 < cut < len(view)})
    first = inner[0] if inner and inner[0] <= max_bytes else min(_HEAD_BYTES, len(view))
    ends: list[int] = []
    start = first
    for stretch_start, stretch_end in pairwise(
        [first, *(c for c in inner if c > first), len(view)]
    ):
        if stretch_start > start and stretch_end - start > max_bytes:
            ends.append(stretch_start)
            start = stretch_start
        while stretch_end - start > max_bytes:
            start += max_bytes
            ends.append(start)
    if start < len(view):
        ends.append(len(view))
    parts = [view[start:end] for start, end in pairwise([first, *ends])]
    return Manifest(bytes(view[:first]), tuple(map(len, parts))), parts


def read_manifest(value: Blob) -> Manifest | None:
    """The manifest a value is; None if it is a blob, or a damaged manifest."""
    if len(value) < _HEADER.size:
        return None
    magic, count, digest = _HEADER.unpack_from(value)
    head = _HEADER.size + _LENGTH.size * count
    if magic != MAGIC or count > _MAX_PARTS or len(value) < head:
        return None
    lengths = struct.unpack_from(f"<{count}I", value, _HEADER.size)
    manifest = Manifest(bytes(value[head:]), lengths)
    if manifest.digest != digest or manifest.num_bytes > _MAX_BLOB_BYTES:
        return None
    return manifest
