"""Symmetric int8 with one float16 scale per vector (layer, K or V, token, head).

    section = int8 values [rows, head_dim] || float16 LE scales [rows] || variant (1 byte)

A scale is rounded up, so a value never leaves [-127, 127] and the error is at most half a scale,
plus the rounding of the page's own dtype. Where a scale would not be finite (NaN or infinity in the
page, or magnitudes beyond 127 x 65504) the section is kept raw and says so in its variant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kv_store.codecs.base import Codec, LayerGroup
from kv_store.errors import PageCorruptError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kv_store.layout import PageLayout

_QUANTISED, _KEPT_RAW = 0, 1
_MAX_LEVEL = np.float32(127)
_FLOAT16_MAX = np.float32(65504)


class Int8Codec(Codec):
    """Ratio 2d / (d + 2) for 16-bit pages of head size d: 1.94 at d = 64."""

    name: ClassVar[str] = "int8"
    codec_id: ClassVar[int] = 2
    is_lossless: ClassVar[bool] = False

    def encode(self, raw: NDArray[np.uint8], group: LayerGroup) -> bytes:
        """Quantise row by row."""
        rows = _to_float32(raw, group.layout)
        largest = np.abs(rows).max(axis=1)
        scales = _round_up_to_float16(largest)
        if not np.isfinite(scales).all():
            return b"".join((raw.data, bytes((_KEPT_RAW,))))
        wide = scales.astype(np.float32)
        inverse = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide > 0)
        levels = np.rint(rows * inverse[:, None]).astype(np.int8)
        return b"".join((levels.data, scales.astype("<f2").data, bytes((_QUANTISED,))))

    def decode(self, stored: memoryview, group: LayerGroup, out: NDArray[np.uint8]) -> None:
        """Multiply back and round to the page's dtype."""
        head_dim = group.layout.head_dim
        num_values = group.nbytes // _itemsize(group.layout)
        num_rows = num_values // head_dim
        variant = stored[-1] if stored else None
        if variant == _KEPT_RAW and len(stored) == group.nbytes + 1:
            out[:] = np.frombuffer(stored[:-1], dtype=np.uint8)
            return
        if variant != _QUANTISED or len(stored) != num_values + 2 * num_rows + 1:
            raise PageCorruptError(f"not an int8 section: {len(stored)} bytes, variant {variant}")
        levels = np.frombuffer(stored[:num_values], dtype=np.int8).reshape(num_rows, head_dim)
        scales = np.frombuffer(stored[num_values:-1], dtype="<f2").astype(np.float32)
        _from_float32(np.multiply(levels, scales[:, None], dtype=np.float32), group.layout, out)


def _itemsize(layout: PageLayout) -> int:
    return 4 if layout.dtype == "float32" else 2


def _to_float32(raw: NDArray[np.uint8], layout: PageLayout) -> NDArray[np.float32]:
    """View or widen a section as [rows, head_dim] float32."""
    if layout.dtype == "float32":
        values = raw.view(np.float32)
    elif layout.dtype == "float16":
        values = raw.view(np.float16).astype(np.float32)
    else:  # numpy has no bfloat16: it is the upper half of a float32
        values = (raw.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.reshape(-1, layout.head_dim)


def _from_float32(values: NDArray[np.float32], layout: PageLayout, out: NDArray[np.uint8]) -> None:
    """Round finite values to the page's dtype, to nearest even, into ``out``."""
    flat = values.reshape(-1)
    if layout.dtype == "float32":
        out.view(np.float32)[:] = flat
    elif layout.dtype == "float16":
        # A scale rounded up can carry the page's largest value past the end of float16.
        np.clip(flat, -_FLOAT16_MAX, _FLOAT16_MAX, out=flat)
        out.view(np.float16)[:] = flat
    else:
        bits = flat.view(np.uint32)
        bits += np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        out.view(np.uint16)[:] = bits >> np.uint32(16)


def _round_up_to_float16(largest: NDArray[np.float32]) -> NDArray[np.float16]:
    """The least float16 scale whose 127-fold is at least ``largest``; not finite if none is."""
    with np.errstate(over="ignore", invalid="ignore"):
        scales = (largest / _MAX_LEVEL).astype(np.float16)
        too_small = scales.astype(np.float32) * _MAX_LEVEL < largest
        return np.where(too_small, np.nextafter(scales, np.float16(np.inf)), scales)
