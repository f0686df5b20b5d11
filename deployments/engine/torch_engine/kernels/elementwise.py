"""What stands between the products: norms, rotations and the gate, on float32 rows."""

from __future__ import annotations

import math

import numpy as np

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.memory import float_of_bits
from deployments.engine.torch_engine.kernels.vectors import BLOCK

_LOG2_E = np.float32(1.4426950408889634)
_LN_2_HIGH = np.float32(0.693359375)
_LN_2_LOW = np.float32(-2.12194440e-4)
_ONE, _HALF = np.float32(1), np.float32(0.5)
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
