"""Inner products of dense weights with a few rows of float32.

Each product is summed in an order of its own, which depends neither on how many rows are computed
together nor on how the work is split between threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import literally, types
from numba.extending import intrinsic

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.vectors import (
    DENSE_BF16,
    DENSE_F32,
    HAS_AVX512,
    I64,
    LANES,
    Emitter,
    Loop,
    Value,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_REGISTER = LANES if HAS_AVX512 else 8
_DENSE_TOKENS = 6
_ROWS_OF_FEW, _ROWS_OF_MANY = 4, 4 if HAS_AVX512 else 2
"""Rows that meet one or two tokens at once, and more of them: AVX2 has sixteen registers, of which
the sums of twelve pairs leave enough for weights and inputs. AVX-512 has 32, for 24 pairs."""
_ROW_BYTES = {DENSE_F32: 4, DENSE_BF16: 2}
_STRIP_ROWS = 8
"""What is multiplied with all tokens before the next comes: it stays in the nearest caches."""


@intrinsic(prefer_literal=True)
def _dense_products(
    typing_context, kind, rows, tokens, w, w_stride, x, x_stride, y, y_stride, size, next_w, share
):
    """``y[n][r] = sum(w[r] * x[n])`` for literal counts of rows and tokens; lanes are columns.

    Strides are in bytes, ``size`` is the length of a row, a multiple of sixteen. Meanwhile one of
    ``share`` equal parts of as many rows is fetched from ``next_w`` on.
    """
    num_rows, num_tokens = rows.literal_value, tokens.literal_value
    dtype = kind.literal_value
    row_bytes = _ROW_BYTES[dtype]

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> None:
        emit = Emitter(builder, _REGISTER)
        _, _, _, w, w_stride, x, x_stride, y, y_stride, size, next_w, share = args
        w_rows = [emit.step(w, w_stride, r) for r in range(num_rows)]
        x_rows = [emit.step(x, x_stride, n) for n in range(num_tokens)]
        steps = builder.sdiv(size, ir.Constant(I64, LANES))
        loop = Loop(builder, steps, emit.zeros(num_rows * num_tokens))
        w_at = builder.mul(loop.index, ir.Constant(I64, row_bytes * LANES))
        x_at = builder.mul(loop.index, ir.Constant(I64, 4 * LANES))
        # Evenly, so that memory works as long as the processor does.
        step_bytes = row_bytes * LANES * num_rows
        next_at = builder.mul(loop.index, builder.sdiv(ir.Constant(I64, step_bytes), share))
        emit.prefetch_all(builder.add(next_w, next_at), step_bytes)
        sums = list(loop.carried)
        for first in range(0, LANES, _REGISTER):
            weight_at, column_at = emit.at(w_at, row_bytes * first), emit.at(x_at, 4 * first)
            weights = [emit.load_floats(builder.add(row, weight_at), dtype) for row in w_rows]
            # Token by token: a compiler that loads all inputs first runs out of registers.
            for n, row in enumerate(x_rows):
                column = emit.load_floats(builder.add(row, column_at), DENSE_F32)
                for r, weight in enumerate(weights):
                    at = r * num_tokens + n
                    sums[at] = emit.fma(weight, column, sums[at])
        loop.close(sums)
        for r in range(num_rows):
            for n in range(num_tokens):
                target = emit.at(emit.step(y, y_stride, n), 4 * r)
                emit.store(emit.total(sums[r * num_tokens + n]), target)

    signature = types.void(kind, rows, tokens, *[types.int64] * 9)
    return signature, generate


@kernel
def _dense_strip(
    kind, rows, tokens, w, w_stride, x, stride, y, y_stride, count, size, next_w, num_turns
):
    """``count`` rows, ``rows`` at once and the rest one by one, for literal ``tokens``.

    Of the next strip one of ``num_turns`` parts is fetched meanwhile, from ``next_w`` on.
    """
    literally(kind)
    literally(rows)
    literally(tokens)
    r = 0
    while r < count:
        at, to, far = w + r * w_stride, y + 4 * r, next_w + r * w_stride // num_turns
        if r + rows <= count:
            _dense_products(
                kind, rows, tokens, at, w_stride, x, stride, to, y_stride, size, far, num_turns
            )
            r += rows
        else:
            _dense_products(
                kind, 1, tokens, at, w_stride, x, stride, to, y_stride, size, far, num_turns
            )
            r += 1


@kernel
def _evenly(count, most):
    """The first of equal parts of ``count`` that are at most ``most``."""
    num_parts = (count + most - 1) // most
    return (count + num_parts - 1) // num_parts


@kernel
def multiply_rows(kind, w, x, y, y_stride, first, last, num_tokens, size):
    """Rows ``first`` to ``last`` of a dense matrix; weights leave memory once."""
    literally(kind)
    w_stride = size * (4 if kind == DENSE_F32 else 2)
    stride = 4 * size
    num_turns = (num_tokens + _DENSE_TOKENS - 1) // _DENSE_TOKENS
    for r in range(first, last, _STRIP_ROWS):
        row, out = w + r * w_stride, y + 4 * r
        count = min(_STRIP_ROWS, last - r)
        n = 0
        for turn in range(num_turns):
            far = row + _STRIP_ROWS * w_stride + turn * count * w_stride // num_turns
            at, to = x + n * stride, out + n * y_stride
            tokens = _evenly(num_tokens - n, _DENSE_TOKENS)
            if tokens == 1:
                _dense_strip(
                    kind, _ROWS_OF_FEW, 1, row, w_stride, at, stride, to, y_stride, count, size,
                    far, num_turns,
                )  # fmt: skip
            elif tokens == 2:
                _dense_strip(
                    kind, _ROWS_OF_FEW, 2, row, w_stride, at, stride, to, y_stride, count, size,
                    far, num_turns,
                )  # fmt: skip
            elif tokens == 3:
                _dense_strip(
                    kind, _ROWS_OF_MANY, 3, row, w_stride, at, stride, to, y_stride, count, size,
                    far, num_turns,
                )  # fmt: skip
            elif tokens == 4:
                _dense_strip(
                    kind, _ROWS_OF_MANY, 4, row, w_stride, at, stride, to, y_stride, count, size,
                    far, num_turns,
                )  # fmt: skip
            elif tokens == 5:
                _dense_strip(
                    kind, _ROWS_OF_MANY, 5, row, w_stride, at, stride, to, y_stride, count, size,
                    far, num_turns,
                )  # fmt: skip
            else:
                _dense_strip(
                    kind, _ROWS_OF_MANY, 6, row, w_stride, at, stride, to, y_stride, count, size,
                    far, num_turns,
                )  # fmt: skip
            n += tokens
