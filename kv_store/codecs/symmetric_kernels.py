"""Compiled loops of the codec with one scale a vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kv_store.codecs.float_bits import float_of_bits, to_bits
from kv_store.codecs.halves import (
    INF_HALF,
    floats_of,
    get_half,
    half_to_float,
    level_of,
    narrow,
    put_half,
    scale_half,
    widen,
)
from kv_store.compiling import compiled

if TYPE_CHECKING:
    from kv_store.codecs.halves import Raw, Words

HALVES = "8f2c42e522dcfbca"
"""Digest of ``halves``, see there."""
_BLOCK_ROWS = 64  # at a time: row by row, short loops would cost more than their work


@compiled
def encode_symmetric(words: Words, is_half: bool, width: int, levels: Raw, scales: Raw) -> bool:
    """Rows of ``width`` values to int8 [rows, width] and one half each; False: not finite."""
    block = np.empty(_BLOCK_ROWS * width, np.float32)
    largest, halves = np.empty(_BLOCK_ROWS, np.uint32), np.empty(_BLOCK_ROWS, np.uint16)
    inverses = np.empty(_BLOCK_ROWS, np.float32)
    for begin in range(0, words.size, block.size):
        values = block[: min(block.size, words.size - begin)]
        num_rows = values.size // width
        widen(words[begin : begin + values.size], is_half, values)
        for r in range(num_rows):
            row = values[r * width : (r + 1) * width]
            most = np.uint32(0)
            for i in range(width):
                most = max(most, np.uint32(to_bits(row[i]) & np.uint32(0x7FFFFFFF)))
            largest[r] = most
        num_bad = 0
        for r in range(num_rows):
            half = scale_half(float_of_bits(largest[r]), np.float32(127))
            scale = half_to_float(half)
            inverse = np.float32(1) / scale
            inverses[r] = inverse if scale > 0 else np.float32(0)
            halves[r] = half
            num_bad += (largest[r] >= np.uint32(0x7F800000)) | (half >= INF_HALF)
        if num_bad:
            return False
        for r in range(num_rows):
            put_half(scales, begin // width + r, halves[r])
            row, inverse = values[r * width : (r + 1) * width], inverses[r]
            level = levels[begin + r * width : begin + (r + 1) * width]
            for i in range(width):
                level[i] = level_of(row[i] * inverse)
    return True


@compiled
def decode_symmetric(levels: Raw, scales: Raw, is_half: bool, width: int, words: Words) -> None:
    """The way back."""
    block, scale = np.empty(_BLOCK_ROWS * width, np.float32), np.empty(_BLOCK_ROWS, np.float32)
    for begin in range(0, words.size, block.size):
        target = words[begin : begin + block.size]
        values = floats_of(target, block)
        for r in range(values.size // width):
            scale[r] = get_half(scales, begin // width + r)
        for r in range(values.size // width):
            level = levels[begin + r * width : begin + (r + 1) * width]
            row, step = values[r * width : (r + 1) * width], scale[r]
            for i in range(width):
                row[i] = np.float32(np.int8(level[i])) * step
        narrow(values, is_half, target)
