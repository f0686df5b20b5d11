"""What stands between the products: norms, rotations and the gate, on float32 rows.

Loops run from 0 over slices: an index that might be negative would keep them from becoming vector
code, which is up to nine times faster.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.memory import address, float_of_bits
from deployments.engine.torch_engine.kernels.vectors import (
    BLOCK,
    DENSE_F32,
    F32,
    Emitter,
    Value,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    numbers, result = x[row, start : start + size], out[out_row, out_start : out_start + size]
    total = np.float32(0)
    for i in range(size):
        total += numbers[i] * numbers[i]
    scale = _ONE / np.float32(math.sqrt(total / np.float32(size) + eps))
    for i in range(size):
        result[i] = numbers[i] * scale * weight[i]


@kernel
def sum_blocks(x, first, last, size, sums):
    """The sum of every block of columns, into ``sums[row * num_blocks + block]``."""
    for n in range(first, last):
        for block in range(size // BLOCK):
            numbers, total = x[n, block * BLOCK : block * BLOCK + BLOCK], np.float32(0)
            for i in range(BLOCK):
                total += numbers[i]
            sums[n * (size // BLOCK) + block] = total


@intrinsic
def _round_block(typing_context, x, rounded, scales):
    """One block of ``round_blocks``: addresses of its numbers, whole numbers, and scale and sum."""

    def generate(context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        emit = Emitter(builder, BLOCK)
        x, rounded, scales = args
        numbers = emit.load_floats(x, DENSE_F32)
        top = emit.largest_size(numbers)
        largest = ir.Constant(F32, 32767.0)
        is_zero = builder.fcmp_ordered("==", top, ir.Constant(F32, 0.0))
        factor = builder.select(is_zero, top, builder.fdiv(largest, top))
        emit.store_shorts(emit.nearest(builder.fmul(numbers, emit.splat(factor))), rounded)
        emit.store(builder.fmul(top, ir.Constant(F32, 1 / 32767)), scales)
        emit.store(emit.total(numbers), emit.at(scales, 4))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@kernel
def round_blocks(x, first, last, size, rounded, scales):
    """Whole numbers of sixteen bits for every block of columns: ``x`` is about number * scale.

    Args:
        x: [last or more, size] float32, contiguous.
        first: the first row to round.
        last: the row behind the last one.
        size: a multiple of the block.
        rounded: [last * size or more] int16, the numbers.
        scales: [last * blocks * 2 or more] float32: per block the scale and the sum of x, which
            is not a number where one of the block is none.
    """
    x_at, rounded_at, scales_at = address(x), address(rounded), address(scales)
    for block in range(first * (size // BLOCK), last * (size // BLOCK)):
        _round_block(
            x_at + 4 * BLOCK * block, rounded_at + 2 * BLOCK * block, scales_at + 8 * block
        )


@kernel
def rotate(x, row, start, size, cos_sin):
    """Turn the pairs (i, i + size / 2) of one head by its token's angles, in place."""
    half = size // 2
    firsts, seconds = x[row, start : start + half], x[row, start + half : start + size]
    for i in range(half):
        cos, sin = cos_sin[0, row, i], cos_sin[1, row, i]
        first, second = firsts[i], seconds[i]
        firsts[i] = first * cos - second * sin
        seconds[i] = second * cos + first * sin


@kernel
def gate(x, first, last, size, out):
    """``silu(gate) * up`` of rows ``first`` to ``last``; up lies ``size`` columns behind."""
    for n in range(first, last):
        gates, ups, results = x[n, :size], x[n, size : 2 * size], out[n]
        for i in range(size):
            results[i] = gates[i] / (_ONE + exponential(-gates[i])) * ups[i]
