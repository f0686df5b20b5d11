import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kv_store import EXACT, PageCorruptError
from kv_store.codecs.base import Codec
from kv_store.codecs.int8 import Int8Codec
from kv_store.codecs.lossless import LosslessCodec
from kv_store.codecs.raw import RawCodec
from kv_store.codecs.registry import BUILTIN_CODECS, load_codec, readable_codecs
from tests.kv_pages import from_floats, make_layout, make_page, round_trip, to_floats, whole_page

DTYPES = ["float32", "float16", "bfloat16"]
EXAMPLE = "docs.examples.custom_codec:BytePlaneCodec"
ROOT = Path(__file__).parents[4]


class TakesBuiltinName(RawCodec):
    codec_id = 2000


class TakesBuiltinId(RawCodec):
    name = "mine"


@pytest.mark.parametrize("spec", ["raw", "lossless", EXAMPLE])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lossless_codecs_keep_every_bit(spec, dtype):
    codec = load_codec(spec)
    layout = make_layout(dtype=dtype)
    page = np.random.default_rng(1).integers(0, 256, layout.nbytes, dtype=np.uint8)
    assert np.array_equal(round_trip(codec, page, layout)[0], page)
    assert codec.fidelity == EXACT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 300.0])
def test_int8_error_is_at_most_half_a_scale(dtype, scale):
    layout = make_layout(dtype=dtype, head_dim=64)
    page = make_page(layout, scale=scale)
    wanted = to_floats(page, layout)
    got = to_floats(round_trip(Int8Codec(), page, layout)[0], layout)
    largest = np.abs(wanted).max(axis=1, keepdims=True)
    # A float16 scale is at most 1/1024 (or its least subnormal, 2**-24) above the ideal one.
    scales = largest / 127 * (1 + 2**-10) + 2**-24
    rounding = {"float32": 2**-22, "float16": 2**-10, "bfloat16": 2**-8}[dtype]
    assert (np.abs(got - wanted) <= scales / 2 + largest * rounding + 2**-24).all()


@pytest.mark.parametrize(("dtype", "ratio"), [("float32", 3.87), ("float16", 1.93)])
def test_int8_ratio(dtype, ratio):
    layout = make_layout(dtype=dtype, head_dim=64)
    assert layout.nbytes / round_trip(Int8Codec(), make_page(layout), layout)[1] > ratio


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_zero_rows_stay_zero(dtype):
    layout = make_layout(dtype=dtype)
    page = np.zeros(layout.nbytes, dtype=np.uint8)
    assert np.array_equal(round_trip(Int8Codec(), page, layout)[0], page)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_keeps_what_it_cannot_scale(dtype, odd):
    layout = make_layout(dtype=dtype)
    values = to_floats(make_page(layout), layout)
    values[3, 1] = odd
    page = from_floats(values.reshape(-1), layout)
    assert np.array_equal(round_trip(Int8Codec(), page, layout)[0], page)


def test_int8_largest_float16_stays_finite():
    layout = make_layout(dtype="float16")
    page = np.full(layout.nbytes // 2, 65504, dtype=np.float16).view(np.uint8)
    got = to_floats(round_trip(Int8Codec(), page, layout)[0], layout)
    assert np.isfinite(got).all()
    assert np.abs(got - 65504).max() <= 65504 / 254


@given(
    hnp.arrays(
        np.float32,
        make_layout().nbytes // 4,
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False),
    )
)
def test_int8_is_bounded_for_any_float32(values):
    layout = make_layout()
    page = values.view(np.uint8)
    got = to_floats(round_trip(Int8Codec(), page, layout)[0], layout)
    rows = values.reshape(got.shape)
    largest = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64)
    assert (np.abs(got - rows) <= largest * (1 / 253) + 2.0**-24).all()


@pytest.mark.parametrize("spec", [*BUILTIN_CODECS, EXAMPLE])
@pytest.mark.parametrize("stored", [b"", b"\x00", b"\x01" * 9, b"\x07" * 1000])
def test_bytes_of_another_make_are_refused(spec, stored):
    layout = make_layout()
    with pytest.raises(PageCorruptError):
        load_codec(spec).decode(
            memoryview(stored), whole_page(layout), np.empty(layout.nbytes, dtype=np.uint8)
        )


def test_builtin_names_ids_and_fidelities():
    codecs = [load_codec(name) for name in BUILTIN_CODECS]
    assert [codec.name for codec in codecs] == list(BUILTIN_CODECS)
    assert [codec.codec_id for codec in codecs] == [1, 3, 2, 6, 7]  # in stored pages for ever
    assert [codec.fidelity for codec in codecs] == [
        EXACT,
        EXACT,
        "lossy:int8",
        "lossy:k8v4",
        "lossy:int4",
    ]


def test_a_reader_takes_every_codec_of_its_fidelity():
    custom = load_codec(EXAMPLE)
    assert set(readable_codecs(RawCodec())) == {RawCodec.codec_id, LosslessCodec.codec_id}
    assert set(readable_codecs(Int8Codec())) == {Int8Codec.codec_id}
    assert set(readable_codecs(custom)) == {1, 3, custom.codec_id}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("zstd", "unknown codec"),
        ("no_such_module:Codec", "cannot import"),
        ("kv_store.codecs.raw:Missing", "cannot import"),
        ("kv_store.page_format:PageHeader", "not a concrete subclass"),
        (f"{Codec.__module__}:Codec", "not a concrete subclass"),
        (f"{__name__}:TakesBuiltinName", "built-in name"),
        (f"{__name__}:TakesBuiltinId", "codec_id must be"),
    ],
)
def test_bad_specs_are_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        load_codec(spec)


def test_the_documented_example_runs():
    result = subprocess.run(
        [sys.executable, "docs/examples/custom_codec.py"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "read back bit for bit: True" in result.stdout
