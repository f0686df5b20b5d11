import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kv_store import PageCorruptError
from kv_store.codecs.lossless import LosslessCodec
from tests.kv_pages import make_layout, make_page, round_trip, whole_page

CODEC = LosslessCodec()
DTYPES = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize(
    ("dtype", "ratio"), [("bfloat16", 1.4), ("float16", 1.15), ("float32", 1.15)]
)
def test_it_shrinks_what_looks_like_activations(dtype, ratio):
    layout = make_layout(dtype=dtype, head_dim=64, page_tokens=64)
    page = make_page(layout)
    unpacked, num_stored = round_trip(CODEC, page, layout)
    assert np.array_equal(unpacked, page)
    assert layout.nbytes / num_stored > ratio


@given(st.sampled_from(DTYPES), st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_any_bits_come_back(dtype, seed, num_layers):
    layout = make_layout(dtype=dtype, num_layers=num_layers)
    page = np.random.default_rng(seed).integers(0, 256, layout.nbytes, dtype=np.uint8)
    assert np.array_equal(round_trip(CODEC, page, layout)[0], page)


def stored_section(layout):
    raw = make_page(layout)
    raw.flags.writeable = False
    return CODEC.encode(raw, whole_page(layout))


@pytest.mark.parametrize("num_exponents", [0, 1, 1 << 30])
def test_a_frame_of_another_size_is_refused_before_it_is_unpacked(num_exponents):
    layout = make_layout()
    num_rest = layout.nbytes * 3 // 4
    stored = stored_section(layout)
    frame = zstandard.ZstdCompressor().compress(bytes(min(num_exponents, 4096)))
    if num_exponents > 4096:  # a frame that promises a gigabyte
        header = zstandard.MAGIC_NUMBER.to_bytes(4, "little") + bytes((0xA0,))
        frame = header + num_exponents.to_bytes(4, "little") + frame[6:]
    keys_end = num_rest + 4 + int.from_bytes(stored[num_rest : num_rest + 4], "little")
    for damaged in (
        stored[:num_rest] + len(frame).to_bytes(4, "little") + frame + stored[keys_end:],
        stored[:keys_end] + frame,
        stored[:num_rest] + b"\xff\xff\xff\xff" + stored[num_rest + 4 :],
        stored[: num_rest + 3],
    ):
        with pytest.raises(PageCorruptError):
            CODEC.decode(memoryview(damaged), whole_page(layout), np.empty(layout.nbytes, np.uint8))


@pytest.mark.parametrize("cut", [1, 3, 8])
def test_a_cut_or_extended_frame_is_refused(cut):
    layout = make_layout()
    stored = stored_section(layout)
    for damaged in (stored[:-cut], stored + bytes(cut)):
        with pytest.raises(PageCorruptError):
            CODEC.decode(memoryview(damaged), whole_page(layout), np.empty(layout.nbytes, np.uint8))
