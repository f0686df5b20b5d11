"""What stands between the products: norms, rotations and the gate, on float32 rows."""

from __future__ import annotations

import math

import numpy as np

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.memory import bits_of_float, float_of_bits
from deployments.engine.torch_engine.kernels.vectors import BLOCK

_LOG2_E = np.float32(1.4426950408889634)
_LN_2_HIGH = np.float32(0.693359375)
_LN_2_LOW = np.float32(-2.12194440e-4)
_ONE, _HALF = np.float32(1), np.float32(0.5)
_LARGEST_SHORT = np.float32(32767)
_LOWEST, _HIGHEST = np.float32(-87), np.float32(88)
# Minimax polynomial of exp on [-ln 2 / 2, ln 2 / 2], from the Cephes library's expf.
_P0, _P1, _P2 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_P3, _P4, _P5 = (
    np.float32(4.1665795894e-2),
    np.float32(1.6666665459e-1),
    np.float32(5.0000001201e-1),
)


@kernel
def exponential(x):
    """``exp(x)`` to about two units in the last place; a loop over it becomes vector code."""
    x = min(max(x, _LOWEST), _HIGHEST)
    turns = np.floor(x * _LOG2_E + _HALF)
    r = x - turns * _LN_2_HIGH - turns * _LN_2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    return (p * r * r + r + _ONE) * float_of_bits((np.int32(turns) + np.int32(127)) << np.int32(23))


@kernel
def normalise(x, row, start, size, weight, eps, out, out_row, out_start):
    """Root-mean-square norm of ``x[row, start : start + size]`` into ``out``."""
    total = np.float32(0)
    for i in range(size):
        total += x[row, start + i] * x[row, start + i]
    scale = _ONE / np.float32(math.sqrt(total / np.float32(size) + eps))
    for i in range(size):
        out[out_row, out_start + i] = x[row, start + i] * scale * weight[i]


@kernel
def sum_blocks(x, num_rows, size, sums):
    """The sum of every block of columns, into ``sums[row * num_blocks + block]``."""
    for n in range(num_rows):
        for block in range(size // BLOCK):
            total = np.float32(0)
            for i in range(block * BLOCK, block * BLOCK + BLOCK):
                total += x[n, i]
            sums[n * (size // BLOCK) + block] = total


@kernel
def round_blocks(x, num_rows, size, rounded, scales):
    """Whole numbers of sixteen bits for every block of columns: ``x`` is about number * scale.

    Args:
        x: [num_rows or more, size] float32.
        num_rows: rows to round.
        size: a multiple of the block.
        rounded: [num_rows * size or more] int16, the numbers.
        scales: [num_rows * blocks * 2 or more] float32: per block the scale and the sum of x, which
            is not a number where one of the block is none.
    """
    for n in range(num_rows):
        for block in range(size // BLOCK):
            start = block * BLOCK
            total, top_bits = np.float32(0), np.int32(0)
            for i in range(start, start + BLOCK):
                total += x[n, i]
                # Floats without a sign are in the order of their bits, and integers need no care
                # for what is not a number: this becomes vector code.
                top_bits = max(top_bits, bits_of_float(x[n, i]) & np.int32(0x7FFFFFFF))
            top = float_of_bits(top_bits)
            scale = _LARGEST_SHORT / top if top > 0 else np.float32(0)
            for i in range(start, start + BLOCK):
                rounded[n * size + i] = np.int16(np.int32(np.floor(x[n, i] * scale + _HALF)))
            at = 2 * (n * (size // BLOCK) + block)
            scales[at], scales[at + 1] = top / _LARGEST_SHORT, total


@kernel
def rotate(x, row, start, size, cos_sin):
    """Turn the pairs (i, i + size / 2) of one head by its token's angles, in place."""
    half = size // 2
    for i in range(half):
        cos, sin = cos_sin[0, row, i], cos_sin[1, row, i]
        first, second = x[row, start + i], x[row, start + half + i]
        x[row, start + i] = first * cos - second * sin
        x[row, start + half + i] = second * cos + first * sin


@kernel
def gate(x, num_rows, offset, first, last, out):
    """``silu(gate) * up`` for columns ``first`` to ``last``; up lies ``offset`` columns behind."""
    for n in range(num_rows):
        for i in range(first, last):
            value = x[n, i]
            out[n, i] = value / (_ONE + exponential(-value)) * x[n, offset + i]
