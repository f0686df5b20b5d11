import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kv_store.codecs.base import LayerGroup
from kv_store.codecs.kivi import Int4Codec, K8V4Codec
from kv_store.errors import PageCorruptError
from tests.kv_pages import from_floats, make_layout, make_page, round_trip, to_floats

CODECS = INT4, K8V4 = [Int4Codec(), K8V4Codec()]
DTYPES = ["float32", "float16", "bfloat16"]
ROUNDING = {"float32": 2**-22, "float16": 2**-10, "bfloat16": 2**-8}
LATER = 64

codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def realistic(**changes):
    return make_layout(head_dim=64, page_tokens=64, **changes)


def as_layers(page, layout):
    """[layers, 2, tokens, heads, head_dim] float64."""
    return to_floats(page, layout).reshape(layout.shape).astype(np.float64)


def half_a_scale(part, axis, num_steps, rounding):
    low, high = part.min(axis=axis, keepdims=True), part.max(axis=axis, keepdims=True)
    extent = high - low + np.abs(low) * 2**-10 + 2**-24
    scale = extent / num_steps * (1 + 2**-10) + 2**-24
    largest = np.maximum(np.abs(low), np.abs(high)) + scale
    return scale / 2 * (1 + 2**-20) + largest * rounding + 2**-24


def bounds(wanted, codec, layout):
    """The most each value may be off.

    Half a scale: of keys' channels, of values' vectors, and of wide channels of values.
    """
    rounding = ROUNDING[layout.dtype]
    limits = np.empty_like(wanted)
    keys, values = wanted[:, 0], wanted[:, 1]
    limits[:, 0] = half_a_scale(keys, 1, 15 if codec is INT4 else 255, rounding)
    # A vector of int4 is of all the heads of layouts as small as these.
    vectors = half_a_scale(values, (2, 3) if codec is INT4 else 3, 15, rounding)
    limits[:, 1] = np.maximum(vectors, half_a_scale(values, 1, 255, rounding))
    return limits


@codecs
@dtypes
@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1.0, 300.0])
def test_the_error_is_at_most_half_a_scale(codec, dtype, scale):
    layout = realistic(dtype=dtype)
    page = make_page(layout, scale=scale)
    wanted = as_layers(page, layout)
    got = as_layers(round_trip(codec, page, layout, LATER)[0], layout)
    assert (np.abs(got - wanted) <= bounds(wanted, codec, layout)).all()


@codecs
@dtypes
def test_the_first_tokens_of_a_sequence_are_kept_and_widen_no_range(codec, dtype):
    layout = realistic(dtype=dtype)
    calm = to_floats(make_page(layout), layout).reshape(layout.shape)
    wild = calm.copy()
    wild[:, :, :4] *= 1000
    pages = [from_floats(values.reshape(-1), layout) for values in (calm, wild)]
    first = [as_layers(round_trip(codec, page, layout, 0)[0], layout) for page in pages]
    later = as_layers(round_trip(codec, pages[1], layout, LATER)[0], layout)
    assert np.array_equal(first[1][:, :, :4], as_layers(pages[1], layout)[:, :, :4])
    assert np.array_equal(first[0][:, :, 4:], first[1][:, :, 4:])
    lost = np.abs(later - as_layers(pages[1], layout))[:, 0, 4:].max()
    kept = np.abs(first[1] - as_layers(pages[1], layout))[:, 0, 4:].max()
    assert lost > 10 * kept


@pytest.mark.parametrize(
    ("codec", "dtype", "token_start", "ratio"),
    [
        (INT4, "bfloat16", LATER, 3.5),
        (INT4, "bfloat16", 0, 3.02),
        (INT4, "float32", LATER, 7.01),
        (K8V4, "float16", LATER, 2.44),
        (K8V4, "float32", LATER, 4.89),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_ratio(codec, dtype, token_start, ratio):
    layout = realistic(dtype=dtype)
    num_stored = round_trip(codec, make_page(layout), layout, token_start)[1]
    assert layout.nbytes / num_stored > ratio


@codecs
def test_keys_have_a_range_per_channel_and_values_one_per_token(codec):
    layout = realistic()
    values = to_floats(make_page(layout), layout).reshape(layout.shape).copy()
    values[:, 0, :, :, 5] *= 1000  # a loud channel of the keys
    values[:, 1, 9] *= 1000  # a loud token of the values
    page = from_floats(values.reshape(-1), layout)
    error = np.abs(as_layers(round_trip(codec, page, layout, LATER)[0], layout) - values)
    quiet_keys = np.delete(error[:, 0], 5, axis=-1)
    quiet_values = np.delete(error[:, 1], 9, axis=1)
    assert quiet_keys.max() < 0.5
    assert quiet_values.max() < 0.5
    assert error[:, 0, :, :, 5].max() > 1
    assert error[:, 1, 9].max() > 1


def test_the_widest_channels_of_keys_have_eight_bits():
    layout = realistic()
    values = to_floats(make_page(layout), layout).reshape(layout.shape).copy()
    num_wide = layout.num_kv_heads * layout.head_dim // 14
    loud = np.arange(num_wide) * 7
    values.reshape(*values.shape[:3], -1)[:, 0, :, loud] *= 100
    page = from_floats(values.reshape(-1), layout)
    error = np.abs(as_layers(round_trip(INT4, page, layout, LATER)[0], layout) - values)[:, 0]
    extent = np.ptp(values[:, 0], axis=1, keepdims=True)
    relative = (error / extent).reshape(*error.shape[:2], -1)
    assert relative[..., loud].max() < 1 / 255
    assert np.delete(relative, loud, axis=-1).max() > 1 / 40


@codecs
def test_a_loud_channel_of_values_widens_no_vector(codec):
    layout = realistic()
    calm = to_floats(make_page(layout), layout).reshape(layout.shape)
    values = calm.copy()
    values[:, 1, :, 1, 5] *= 100
    errors = []
    for each in (calm, values):
        page = from_floats(each.reshape(-1), layout)
        found = as_layers(round_trip(codec, page, layout, LATER)[0], layout)
        errors.append(np.abs(found - as_layers(page, layout))[:, 1])
    loud = errors[1][:, :, 1, 5].copy()
    errors[1][:, :, 1, 5] = 0
    assert errors[1].max() < 1.5 * errors[0].max()
    assert loud.max() < np.ptp(values[:, 1, :, 1, 5], axis=1).max() / 255


@codecs
def test_a_channel_that_does_not_exist_is_corrupt(codec):
    layout = realistic()
    group = LayerGroup(layout=layout, first_layer=0, num_layers=1, token_start=LATER)
    raw = make_page(layout)[: group.nbytes]
    stored = bytearray(codec.encode(raw, group))
    channels = layout.num_kv_heads * layout.head_dim
    where = 0 if codec is INT4 else 4 * channels + channels * layout.page_tokens
    assert int.from_bytes(stored[where : where + 2], "little") < channels
    stored[where : where + 2] = channels.to_bytes(2, "little")
    with pytest.raises(PageCorruptError, match="does not exist"):
        codec.decode(memoryview(stored), group, np.empty_like(raw))


@codecs
@dtypes
@pytest.mark.parametrize("value", [0.0, -1.0, 3.0])
def test_equal_values_come_back_equal(codec, dtype, value):
    layout = realistic(dtype=dtype)
    page = from_floats(np.full(layout.nbytes // layout.itemsize, value, np.float32), layout)
    assert np.array_equal(round_trip(codec, page, layout, LATER)[0], page)


@codecs
@dtypes
@pytest.mark.parametrize("token_start", [0, LATER])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e30, -1e30])
@pytest.mark.parametrize("kind", [0, 1])
def test_what_has_no_finite_range_is_kept(codec, dtype, token_start, odd, kind):
    layout = make_layout(dtype=dtype, page_tokens=8)
    values = to_floats(make_page(layout), layout).reshape(layout.shape).copy()
    values[1, kind, 6, 1, 2] = odd
    page = from_floats(values.reshape(-1), layout)
    assert np.array_equal(round_trip(codec, page, layout, token_start)[0], page)


@codecs
@pytest.mark.parametrize("page_tokens", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("token_start", [0, LATER])
def test_odd_shapes(codec, page_tokens, token_start):
    layout = make_layout(page_tokens=page_tokens, num_kv_heads=1, head_dim=3)
    page = make_page(layout)
    wanted = as_layers(page, layout)
    got = as_layers(round_trip(codec, page, layout, token_start)[0], layout)
    assert (np.abs(got - wanted) <= bounds(wanted, codec, layout)).all()


@codecs
@pytest.mark.parametrize("head_dim", [(1 << 15) - 1, 1 << 15])
def test_layers_of_very_many_channels(codec, head_dim):
    layout = make_layout(num_layers=1, num_kv_heads=1, page_tokens=2, head_dim=head_dim)
    page = make_page(layout)
    wanted = as_layers(page, layout)
    got = as_layers(round_trip(codec, page, layout, LATER)[0], layout)
    assert (np.abs(got - wanted) <= bounds(wanted, codec, layout)).all()


def test_largest_float16_stays_finite():
    layout = realistic(dtype="float16")
    page = make_page(layout).view(np.float16).copy()
    page[::3] = 65504
    page[1::3] = -65504
    for codec in CODECS:
        got = to_floats(round_trip(codec, page.view(np.uint8), layout, LATER)[0], layout)
        assert np.isfinite(got).all()


@given(
    hnp.arrays(
        np.float32,
        make_layout(page_tokens=8).shape,
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_nan=False),
    ),
    st.sampled_from(CODECS),
    st.sampled_from([0, LATER]),
)
def test_any_float32_is_bounded(values, codec, token_start):
    layout = make_layout(page_tokens=8)
    page = values.reshape(-1).view(np.uint8)
    got = as_layers(round_trip(codec, page, layout, token_start)[0], layout)
    wanted = values.astype(np.float64)
    assert (np.abs(got - wanted) <= bounds(wanted, codec, layout)).all()
