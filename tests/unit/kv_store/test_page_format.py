import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import xxhash

from kv_store import LayoutMismatchError, PageCorruptError, PageKey, PageUnsupportedError
from kv_store.codecs.int8 import Int8Codec
from kv_store.codecs.raw import RawCodec
from kv_store.codecs.registry import BUILTIN_CODECS, load_codec, readable_codecs
from kv_store.page_format import HEADER_BYTES, decode_page, encode_page, read_header
from tests.kv_pages import make_chain, make_layout, make_page

LAYOUT = make_layout()
KEY = make_chain(LAYOUT, 3)[2]
CREATED_MS = 1_790_000_000_123
GOLDEN = Path(__file__).parent / "golden"
CODECS = [load_codec(name) for name in BUILTIN_CODECS]


def encode(codec=None, key=KEY, layout=LAYOUT, seed=0):
    page = make_page(layout, seed)
    return encode_page(key, page, layout, codec or RawCodec(), created_ms=CREATED_MS)


def decode(blob, codec=None, key=KEY, layout=LAYOUT):
    out = np.empty(layout.nbytes, dtype=np.uint8)
    decode_page(blob, key, layout, readable_codecs(codec or RawCodec()), out)
    return out


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_a_page_is_decoded_to_where_its_layers_lie_apart(codec):
    layout = make_layout(num_layers=19)  # three sections
    key = make_chain(layout, 3)[2]
    blob = encode(codec, key, layout)
    memory = np.full((2, 19, 5, layout.nbytes // 38), 7, dtype=np.uint8)
    decode_page(blob, key, layout, readable_codecs(codec), memory[:, :, 3].transpose(1, 0, 2))
    expected = decode(blob, codec, key, layout).reshape(19, 2, -1)
    assert np.array_equal(memory[:, :, 3].transpose(1, 0, 2), expected)
    assert (np.delete(memory, 3, axis=2) == 7).all()


@pytest.mark.parametrize("shape", [(3, 2, 127), (2, 3, 128), (3, 256), (767,)])
def test_memory_of_another_shape_is_refused(shape):
    with pytest.raises(LayoutMismatchError):
        decode_page(encode(), KEY, LAYOUT, readable_codecs(RawCodec()), np.empty(shape, np.uint8))


def test_memory_with_holes_is_refused():
    out = np.empty((3, 2, 2 * LAYOUT.nbytes // 6), np.uint8)[:, :, ::2]
    with pytest.raises(LayoutMismatchError):
        decode_page(encode(), KEY, LAYOUT, readable_codecs(RawCodec()), out)


def with_header(blob, offset, value):
    """The blob with other header bytes and a CRC32 that fits them."""
    changed = bytearray(blob)
    changed[offset : offset + len(value)] = value
    changed[124:128] = struct.pack("<I", zlib.crc32(changed[:124]))
    return bytes(changed)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_golden_file(codec):
    golden = (GOLDEN / f"page_v1_{codec.name}.bin").read_bytes()
    page = np.linspace(-3, 3, LAYOUT.nbytes // 4, dtype=np.float32).view(np.uint8)
    if codec.name != "lossless":  # another zstd may pack the same exponents otherwise
        assert bytes(encode_page(KEY, page, LAYOUT, codec, created_ms=CREATED_MS)) == golden
    decoded = decode(golden, codec)
    if codec.is_lossless:
        assert np.array_equal(decoded, page)
    else:
        tolerance = {"int8": 3 / 254, "k8v4": 0.003, "int4": 0.02}[codec.name]
        assert np.allclose(decoded.view(np.float32), page.view(np.float32), atol=tolerance)


@pytest.mark.parametrize("name", ["k8v4", "int4"])
def test_golden_file_with_wide_channels(name):
    codec = load_codec(name)
    layout = make_layout(num_layers=1, num_kv_heads=2, head_dim=32, page_tokens=8)
    key = make_chain(layout, 3)[2]
    golden = (GOLDEN / f"page_v1_{name}_wide.bin").read_bytes()
    page = make_page(layout)
    assert bytes(encode_page(key, page, layout, codec, created_ms=CREATED_MS)) == golden
    decoded = decode(golden, codec, key, layout)
    assert np.allclose(decoded.view(np.float32), page.view(np.float32), atol=0.25)


def test_header_says_what_was_written():
    header = read_header(encode())
    assert header.codec_id == RawCodec.codec_id
    assert header.num_tokens == LAYOUT.page_tokens
    assert header.token_start == 2 * LAYOUT.page_tokens
    assert header.raw_length == LAYOUT.nbytes
    assert header.page_hash == KEY.page_hash
    assert header.namespace_id == KEY.namespace_id
    assert header.created_ms == CREATED_MS
    assert header.flags == 0
    assert read_header(encode(Int8Codec())).flags == 1


@pytest.mark.parametrize("num_layers", [1, 8, 9, 30])
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_round_trip_in_sections(num_layers, codec):
    layout = make_layout(num_layers=num_layers)
    key = make_chain(layout, 1)[0]
    blob = encode(codec, key, layout)
    assert read_header(blob).num_sections == -(-num_layers // 8)
    decoded = decode(blob, codec, key, layout).view(np.float32)
    wanted = make_page(layout).view(np.float32)
    assert np.abs(decoded - wanted).max() <= {"int8": 0.02, "k8v4": 0.2, "int4": 0.2}.get(
        codec.name, 0
    )


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_every_flipped_byte_is_found(codec, mask):
    blob = encode(codec)
    for position in range(len(blob)):
        damaged = bytearray(blob)
        damaged[position] ^= mask
        with pytest.raises(PageCorruptError):
            decode(bytes(damaged), codec)


def test_every_truncation_and_any_extension_is_found():
    blob = bytes(encode())
    for length in range(len(blob)):
        with pytest.raises(PageCorruptError):
            decode(blob[:length])
    with pytest.raises(PageCorruptError):
        decode(blob + b"\0")


@pytest.mark.parametrize(
    ("row_offset", "value", "message"),
    [
        (0, struct.pack("<H", 1), "gap or an overlap"),
        (2, struct.pack("<H", 0), "gap or an overlap"),
        (2, struct.pack("<H", 2), "do not cover"),
        (4, struct.pack("<I", 64), "gap or an overlap"),
        (4, struct.pack("<I", 4096), "behind the page"),
        (8, struct.pack("<I", 767), "xxh3-64"),
        (16, bytes(8), "xxh3-64"),
    ],
)
def test_a_wrong_section_table_is_found_even_under_right_checksums(row_offset, value, message):
    blob = bytearray(encode())
    start = HEADER_BYTES + row_offset
    blob[start : start + len(value)] = value
    checksum = xxhash.xxh3_128_digest(bytes(blob[HEADER_BYTES:]))
    with pytest.raises(PageCorruptError, match=message):
        decode(with_header(blob, 96, checksum))


def test_more_sections_than_bytes_are_found():
    with pytest.raises(PageCorruptError, match="longer than the page"):
        decode(with_header(encode(), 12, struct.pack("<I", 2**31)))


def test_another_page_is_not_served():
    other = PageKey(KEY.namespace_id, bytes(32), KEY.index)
    with pytest.raises(PageCorruptError, match="another page"):
        decode(encode(), key=other)
    with pytest.raises(PageCorruptError, match="another page"):
        decode(encode(), key=KEY._replace(namespace_id=bytes(16)))
    with pytest.raises(PageCorruptError, match="starts at token 8"):
        decode(encode(), key=KEY._replace(index=0))


def test_another_layout_is_not_served():
    with pytest.raises(LayoutMismatchError, match="another layout"):
        decode(encode(), layout=make_layout(rope="theta=1"))


@pytest.mark.parametrize("page", [np.zeros(5, np.uint8), np.zeros(192, np.float32)])
def test_wrong_buffers_are_refused(page):
    with pytest.raises(LayoutMismatchError):
        encode_page(KEY, page, LAYOUT, RawCodec(), created_ms=0)


def test_an_exact_reader_refuses_lossy_pages_and_the_other_way_round():
    for codec in CODECS[2:]:
        with pytest.raises(PageUnsupportedError, match=f"codec with id {codec.codec_id}"):
            decode(encode(codec), RawCodec())
    with pytest.raises(PageUnsupportedError, match="codec with id 1"):
        decode(encode(RawCodec()), Int8Codec())
    with pytest.raises(PageCorruptError, match="lossy flag"):
        decode(with_header(encode(), 6, b"\x01\x00"))


def test_newer_pages_are_left_to_newer_readers():
    with pytest.raises(PageUnsupportedError, match="version 2"):
        decode(with_header(encode(), 4, b"\x02\x00"))
    with pytest.raises(PageUnsupportedError, match="flags 0x2"):
        decode(with_header(encode(), 6, b"\x02\x00"))
    with pytest.raises(PageUnsupportedError, match="codec with id 77"):
        decode(with_header(encode(), 8, struct.pack("<I", 77)))
