"""Symmetric int8 with one float16 scale per vector (layer, K or V, token, head).

    section = int8 values [rows, head_dim] || float16 LE scales [rows] || variant (1 byte)

A scale is rounded up, so a value never leaves [-127, 127] and the error is at most half a scale,
plus the rounding of the page's own dtype. Where a scale would not be finite (NaN or infinity in the
page, or magnitudes beyond 127 x 65504) the section is kept raw and says so in its variant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kv_store.codecs.base import Codec, LayerGroup, page_words
from kv_store.errors import PageCorruptError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_QUANTISED, _KEPT_RAW = 0, 1


class Int8Codec(Codec):
    """Ratio 2d / (d + 2) for 16-bit pages of head size d: 1.94 at d = 64; twice that for float32.

    A float32 page costs the same bytes as a 16-bit one, with the same error relative to the
    largest value of each vector.
    """

    name: ClassVar[str] = "int8"
    codec_id: ClassVar[int] = 2
    is_lossless: ClassVar[bool] = False

    def encode(self, raw: NDArray[np.uint8], group: LayerGroup) -> memoryview:
        """Quantise row by row."""
        from kv_store.codecs.symmetric_kernels import encode_symmetric

        num_values, num_rows = _shape(group)
        stored = np.empty(num_values + 2 * num_rows + 1, dtype=np.uint8)
        is_finite = encode_symmetric(
            page_words(raw, group.layout),
            group.layout.dtype == "float16",
            group.layout.head_dim,
            stored[:num_values],
            stored[num_values:-1],
        )
        if not is_finite:
            return memoryview(b"".join((raw.data, bytes((_KEPT_RAW,)))))
        stored[-1] = _QUANTISED
        return stored.data

    def decode(self, stored: memoryview, group: LayerGroup, out: NDArray[np.uint8]) -> None:
        """Multiply back and round to the page's dtype."""
        from kv_store.codecs.symmetric_kernels import decode_symmetric

        num_values, num_rows = _shape(group)
        packed = np.frombuffer(stored.toreadonly(), dtype=np.uint8)
        variant = packed[-1] if len(packed) else None
        if variant == _KEPT_RAW and len(packed) == group.nbytes + 1:
            out[:] = packed[:-1]
            return
        if variant != _QUANTISED or len(packed) != num_values + 2 * num_rows + 1:
            raise PageCorruptError(f"not an int8 section: {len(packed)} bytes, variant {variant}")
        decode_symmetric(
            packed[:num_values],
            packed[num_values:-1],
            group.layout.dtype == "float16",
            group.layout.head_dim,
            page_words(out, group.layout),
        )


def _shape(group: LayerGroup) -> tuple[int, int]:
    """Values and rows of a section."""
    num_values = group.nbytes // group.layout.itemsize
    return num_values, num_values // group.layout.head_dim
