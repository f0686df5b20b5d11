"""One KV page as bytes: fixed header, section table, sections. See docs/kv-page-format.md.

Everything is little-endian. A reader checks the header's CRC32, that the page is the one asked for,
and the xxh3-128 of all that follows, before a codec sees a byte. Checksums guard against accidents,
not against someone who can write to the store.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import xxhash

from kv_store.codecs.base import LayerGroup
from kv_store.errors import (
    KVStoreError,
    LayoutMismatchError,
    PageCorruptError,
    PageUnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kv_store.codecs.base import Codec
    from kv_store.keys import PageKey
    from kv_store.layout import PageLayout

MAGIC: Final = b"KVP1"
VERSION: Final = 1
HEADER_BYTES: Final = 128
SECTION_LAYERS: Final = 8
"""Layers a writer packs into one section; a reader takes any division."""
FLAG_LOSSY: Final = 1

_ALIGNMENT = 64
_LAYOUT_BYTES = 16
_PREFIX = struct.Struct("<4sH")  # magic and version: at the same place in every version
_HEADER = struct.Struct("<4sHHIIIIII32s16s16s16sQI")  # all but the CRC32, 124 bytes
_CRC = struct.Struct("<I")
_SECTION = struct.Struct("<HHIIIQ")  # 24 bytes


class PageHeader(NamedTuple):
    """The fixed header's fields, in file order, without the CRC32."""

    magic: bytes
    version: int
    flags: int
    codec_id: int
    num_sections: int
    num_tokens: int
    token_start: int
    raw_length: int
    stored_length: int
    page_hash: bytes
    namespace_id: bytes
    layout_id: bytes
    payload_xxh3_128: bytes
    created_ms: int
    reserved: int


class Section(NamedTuple):
    """One row of the section table; ``offset`` counts from the page's first byte."""

    first_layer: int
    num_layers: int
    offset: int
    length: int
    reserved: int
    xxh3_64: int


def encode_page(
    key: PageKey, page: NDArray[np.uint8], layout: PageLayout, codec: Codec, *, created_ms: int
) -> memoryview:
    """Pack a page for the tiers.

    Args:
        key: the page's name.
        page: [layout.nbytes] uint8.
        layout: the page's layout.
        codec: packs each section.
        created_ms: Unix time in milliseconds.

    Returns:
        The read-only blob.

    Raises:
        LayoutMismatchError: the buffer does not have the layout's size.
    """
    _check_buffer(page, layout)
    page = page.view()
    page.flags.writeable = False
    token_start = key.index * layout.page_tokens
    layer_bytes = layout.nbytes // layout.num_layers
    groups = [
        LayerGroup(
            layout=layout,
            first_layer=first,
            num_layers=min(SECTION_LAYERS, layout.num_layers - first),
            token_start=token_start,
        )
        for first in range(0, layout.num_layers, SECTION_LAYERS)
    ]
    stored = [
        memoryview(codec.encode(page[g.first_layer * layer_bytes :][: g.nbytes], g)).cast("B")
        for g in groups
    ]
    end = HEADER_BYTES + len(groups) * _SECTION.size
    table: list[Section] = []
    for group, data in zip(groups, stored, strict=True):
        offset = _align(end)
        checksum = xxhash.xxh3_64_intdigest(data)
        table.append(Section(group.first_layer, group.num_layers, offset, len(data), 0, checksum))
        end = offset + len(data)
    blob = bytearray(end)
    for index, (section, data) in enumerate(zip(table, stored, strict=True)):
        _SECTION.pack_into(blob, HEADER_BYTES + index * _SECTION.size, *section)
        blob[section.offset : section.offset + section.length] = data
    header = PageHeader(
        magic=MAGIC,
        version=VERSION,
        flags=0 if codec.is_lossless else FLAG_LOSSY,
        codec_id=codec.codec_id,
        num_sections=len(table),
        num_tokens=layout.page_tokens,
        token_start=token_start,
        raw_length=layout.nbytes,
        stored_length=end - HEADER_BYTES,
        page_hash=key.page_hash,
        namespace_id=key.namespace_id,
        layout_id=layout.fingerprint[:_LAYOUT_BYTES],
        payload_xxh3_128=xxhash.xxh3_128_digest(memoryview(blob)[HEADER_BYTES:]),
        created_ms=created_ms,
        reserved=0,
    )
    _HEADER.pack_into(blob, 0, *header)
    _CRC.pack_into(blob, _HEADER.size, zlib.crc32(memoryview(blob)[: _HEADER.size]))
    return memoryview(blob).toreadonly()


def read_header(blob: bytes | memoryview) -> PageHeader:
    """The header, once its magic, CRC32 and version hold.

    Raises:
        PageCorruptError: not a header.
        PageUnsupportedError: a sound header of another version or with flags unknown here.
    """
    if len(blob) < HEADER_BYTES:
        raise PageCorruptError(f"{len(blob)} bytes are no page")
    magic, version = _PREFIX.unpack_from(blob)
    if magic != MAGIC:
        raise PageCorruptError("the magic bytes are wrong")
    if _CRC.unpack_from(blob, _HEADER.size)[0] != zlib.crc32(blob[: _HEADER.size]):
        raise PageCorruptError("the header's CRC32 is wrong")
    if version != VERSION:
        raise PageUnsupportedError(f"page format version {version}")
    header = PageHeader._make(_HEADER.unpack_from(blob))
    if header.flags & ~FLAG_LOSSY or header.reserved:
        raise PageUnsupportedError(f"page flags {header.flags:#x}")
    return header


def decode_page(
    blob: bytes | memoryview,
    key: PageKey,
    layout: PageLayout,
    codecs: Mapping[int, Codec],
    out: NDArray[np.uint8],
) -> None:
    """Verify everything against the key that was asked for, then unpack.

    Args:
        blob: what a tier returned.
        key: the page that was asked for.
        layout: the store's layout.
        codecs: by id, those whose pages may be served.
        out: [layout.nbytes] uint8, or [num_layers, 2, bytes of one layer's keys or values] whose
            layers lie apart; undefined if this raises.

    Raises:
        PageCorruptError: any doubt about the bytes.
        LayoutMismatchError: a sound page of another layout, or a buffer of another size.
        PageUnsupportedError: a sound page of this key that this process cannot read.
    """
    rows = _rows_of(out, layout)
    blob = memoryview(blob)
    header = read_header(blob)
    _check_identity(header, key, layout)
    _check_payload(header, blob)
    codec = codecs.get(header.codec_id)
    if codec is None:
        raise PageUnsupportedError(f"no codec with id {header.codec_id} for this fidelity")
    if bool(header.flags & FLAG_LOSSY) == codec.is_lossless:
        raise PageCorruptError(f"the lossy flag contradicts codec {codec.name}")
    for section in _read_sections(blob, header, layout):
        group = LayerGroup(
            layout=layout,
            first_layer=section.first_layer,
            num_layers=section.num_layers,
            token_start=header.token_start,
        )
        data = blob[section.offset : section.offset + section.length]
        part = rows[section.first_layer :][: section.num_layers]
        if part.flags.c_contiguous:
            codec.decode(data, group, part.reshape(-1))
        else:  # a section is small enough to be copied within the cache
            whole = np.empty(group.nbytes, dtype=np.uint8)
            codec.decode(data, group, whole)
            part[:] = whole.reshape(part.shape)


def section_offsets(blob: bytes | memoryview) -> list[int]:
    """Where each section begins, so that a tier may cut there; nothing if this is no page."""
    try:
        header = read_header(blob)
    except KVStoreError:
        return []
    end = HEADER_BYTES + header.num_sections * _SECTION.size
    if end > len(blob):
        return []
    rows = (_SECTION.unpack_from(blob, row) for row in range(HEADER_BYTES, end, _SECTION.size))
    return [Section._make(row).offset for row in rows]


def check_page(blob: bytes | memoryview, namespace_id: bytes, page_hash: bytes) -> PageHeader:
    """Verify what can be verified without the layout: which page it is, and every byte of it.

    Args:
        blob: what a tier holds.
        namespace_id: of the name it is held under.
        page_hash: likewise.

    Raises:
        PageCorruptError: not a page, damaged, or another page.
        PageUnsupportedError: a sound header of another version or with flags unknown here.
    """
    blob = memoryview(blob)
    header = read_header(blob)
    if header.namespace_id != namespace_id or header.page_hash != page_hash:
        raise PageCorruptError("this is another page than the one asked for")
    _check_payload(header, blob)
    return header


def _check_payload(header: PageHeader, blob: memoryview) -> None:
    if header.stored_length != len(blob) - HEADER_BYTES:
        raise PageCorruptError(f"{len(blob)} bytes, header says {header.stored_length} + header")
    if header.payload_xxh3_128 != xxhash.xxh3_128_digest(blob[HEADER_BYTES:]):
        raise PageCorruptError("the payload's xxh3-128 is wrong")


def _check_buffer(page: NDArray[np.uint8], layout: PageLayout) -> None:
    if page.dtype != np.uint8 or page.shape != (layout.nbytes,) or not page.flags.c_contiguous:
        raise LayoutMismatchError(
            f"a page is [{layout.nbytes}] uint8, got {page.shape} {page.dtype}"
        )


def _rows_of(out: NDArray[np.uint8], layout: PageLayout) -> NDArray[np.uint8]:
    """[num_layers, 2, bytes of one layer's keys or values], in the memory of ``out``."""
    shape = layout.num_layers, 2, layout.nbytes // (2 * layout.num_layers)
    if out.dtype == np.uint8 and out.shape == shape and out.strides[2] == 1:
        return out
    _check_buffer(out, layout)
    return out.reshape(shape)


def _check_identity(header: PageHeader, key: PageKey, layout: PageLayout) -> None:
    if header.namespace_id != key.namespace_id or header.page_hash != key.page_hash:
        raise PageCorruptError("this is another page than the one asked for")
    if header.layout_id != layout.fingerprint[:_LAYOUT_BYTES]:
        raise LayoutMismatchError("the page was written with another layout")
    if header.raw_length != layout.nbytes or header.num_tokens != layout.page_tokens:
        raise LayoutMismatchError("the page has another size than the layout")
    if header.token_start != key.index * layout.page_tokens:
        raise PageCorruptError(f"the page starts at token {header.token_start}")


def _read_sections(blob: memoryview, header: PageHeader, layout: PageLayout) -> list[Section]:
    """The table, once its sections cover all layers in order inside the blob and check out."""
    end = HEADER_BYTES + header.num_sections * _SECTION.size
    if end > len(blob):
        raise PageCorruptError("the section table is longer than the page")
    sections = [
        Section._make(_SECTION.unpack_from(blob, start))
        for start in range(HEADER_BYTES, end, _SECTION.size)
    ]
    next_layer = 0
    for section in sections:
        if section.first_layer != next_layer or section.num_layers == 0 or section.offset < end:
            raise PageCorruptError("the section table has a gap or an overlap")
        next_layer += section.num_layers
        end = section.offset + section.length
        if end > len(blob):
            raise PageCorruptError("a section ends behind the page")
        if section.xxh3_64 != xxhash.xxh3_64_intdigest(blob[section.offset : end]):
            raise PageCorruptError("a section's xxh3-64 is wrong")
    if next_layer != layout.num_layers or end != len(blob):
        raise PageCorruptError("the sections do not cover the page")
    return sections


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
