"""Inner products of stored weights with a few rows of float32.

Each product is summed in an order of its own, which depends neither on how many rows are computed
together nor on how the work is split between threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llvmlite import ir
from numba import carray, literally, types
from numba.extending import intrinsic

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.memory import pointer
from deployments.engine.torch_engine.kernels.vectors import (
    BLOCK,
    DENSE_BF16,
    DENSE_F32,
    HAS_AVX512,
    I64,
    LANES,
    Q4_1,
    Q4_1_SHORT,
    Q4_1_TILE_BYTES,
    Q8_0,
    Q8_0_TILE_BYTES,
    Emitter,
    Loop,
    Value,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_NIBBLE_COLUMNS = [
    [first + column for column in (0, 2, 4, 6, 1, 3, 5, 7)] for first in range(0, BLOCK, 8)
]
_SHORT_ROWS = LANES if HAS_AVX512 else LANES // 2
"""Rows of a tile that are multiplied at once: elsewhere the inputs would leave the registers."""
_DENSE_TOKENS = 4 if HAS_AVX512 else 2
_PAIR_ROWS = 4 if HAS_AVX512 else 2
"""How many tokens meet how many rows at once: AVX2 has sixteen registers, of which four pairs of
sixteen floats take eight for their sums, and leave enough for weights and inputs. AVX-512 has 32,
twice as long."""
_ROW_BYTES = {DENSE_F32: 4, DENSE_BF16: 2}
_AHEAD_BYTES = 2048
"""How far ahead tiles are fetched: the more tokens use one, the later the processor would ask."""
_STRIP_ROWS, _STRIP_TILES = 8, 4
"""What is multiplied with all tokens before the next comes: it stays in the nearest caches."""


@intrinsic(prefer_literal=True)
def _dense_products(
    typing_context, kind, rows, tokens, w, w_stride, x, x_stride, y, y_stride, size
):
    """``y[n][r] = sum(w[r] * x[n])`` for literal counts of rows and tokens; lanes are columns.

    Strides are in bytes, ``size`` is the length of a row, a multiple of sixteen.
    """
    num_rows, num_tokens = rows.literal_value, tokens.literal_value
    dtype = kind.literal_value
    row_bytes = _ROW_BYTES[dtype] * LANES

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> None:
        emit = Emitter(builder)
        _, _, _, w, w_stride, x, x_stride, y, y_stride, size = args
        w_rows = [emit.step(w, w_stride, r) for r in range(num_rows)]
        x_rows = [emit.step(x, x_stride, n) for n in range(num_tokens)]
        steps = builder.sdiv(size, ir.Constant(I64, LANES))
        loop = Loop(builder, steps, emit.zeros(num_rows * num_tokens))
        w_at = builder.mul(loop.index, ir.Constant(I64, row_bytes))
        x_at = builder.mul(loop.index, ir.Constant(I64, 4 * LANES))
        columns = [emit.load_floats(builder.add(row, x_at), DENSE_F32) for row in x_rows]
        sums = []
        for r, row in enumerate(w_rows):
            # Rows are too short for the processor to foresee the next ones by itself.
            emit.prefetch(builder.add(emit.step(row, w_stride, num_rows), w_at))
            weights = emit.load_floats(builder.add(row, w_at), dtype)
            for n, column in enumerate(columns):
                sums.append(emit.fma(weights, column, loop.carried[r * num_tokens + n]))
        loop.close(sums)
        for r in range(num_rows):
            for n in range(num_tokens):
                target = emit.at(emit.step(y, y_stride, n), 4 * r)
                emit.store(emit.total(sums[r * num_tokens + n]), target)

    signature = types.void(kind, rows, tokens, *[types.int64] * 7)
    return signature, generate


@intrinsic(prefer_literal=True)
def _tile_products(
    typing_context, kind, tokens, w, x, x_stride, sums, sums_stride, y, y_stride, num_blocks
):
    """The same for one quantised tile of sixteen rows; lanes are rows.

    ``sums`` holds the sum of each block of x, which the minimum of a block is multiplied with.
    """
    form, num_tokens = kind.literal_value, tokens.literal_value

    def generate(_context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        emit = Emitter(builder)
        _, _, w, x, x_stride, sums, sums_stride, y, y_stride, num_blocks = args
        x_rows = [emit.step(x, x_stride, n) for n in range(num_tokens)]
        s_rows = [emit.step(sums, sums_stride, n) for n in range(num_tokens)]
        loop = Loop(builder, num_blocks, emit.zeros(num_tokens))
        tile_bytes = Q4_1_TILE_BYTES if form == Q4_1 else Q8_0_TILE_BYTES
        block = builder.add(w, builder.mul(loop.index, ir.Constant(I64, tile_bytes)))
        emit.prefetch_all(emit.at(block, _AHEAD_BYTES), tile_bytes)
        x_at = builder.mul(loop.index, ir.Constant(I64, 4 * BLOCK))
        columns = [builder.add(row, x_at) for row in x_rows]
        products = emit.zeros(num_tokens)
        for column, weights in _tile_columns(emit, form, block):
            for n, x_row in enumerate(columns):
                value = emit.load_splat(emit.at(x_row, 4 * column))
                products[n] = emit.fma(weights, value, products[n])
        totals = []
        sum_at = builder.mul(loop.index, ir.Constant(I64, 4))
        scale = emit.load_halves(block)
        for product, s_row, carried in zip(products, s_rows, loop.carried, strict=True):
            total = emit.fma(scale, product, carried)
            if form == Q4_1:
                minimum = emit.load_halves(emit.at(block, 2 * LANES))
                block_sum = emit.load_splat(builder.add(s_row, sum_at))
                total = emit.fma(minimum, block_sum, total)
            totals.append(total)
        loop.close(totals)
        for n, total in enumerate(totals):
            emit.store(total, emit.step(y, y_stride, n))

    signature = types.void(kind, tokens, *[types.int64] * 8)
    return signature, generate


def _tile_columns(emit: Emitter, form: int, block: Value) -> Iterator[tuple[int, Value]]:
    """Columns of a tile's block and their numbers."""
    if form == Q8_0:
        for column in range(BLOCK):
            yield column, emit.load_signed(emit.at(block, LANES * (2 + column)))
        return
    for first in range(0, BLOCK, 8):
        nibbles = emit.load_nibbles(emit.at(block, LANES * (4 + first // 2)))
        yield from zip(_NIBBLE_COLUMNS[first // 8], nibbles, strict=True)


@intrinsic(prefer_literal=True)
def _short_products(
    typing_context, tokens, w, x, x_stride, scales, scales_stride, y, y_stride, num_blocks
):
    """The same for Q4_1 and inputs from ``round_blocks``; sums within a block are exact.

    ``scales`` holds the scale and the sum of each block of x.
    """
    num_tokens = tokens.literal_value

    def generate(context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        emit = Emitter(builder, _SHORT_ROWS)
        _, w, x, x_stride, scales, scales_stride, y, y_stride, num_blocks = args
        over_parts = Loop(builder, ir.Constant(I64, LANES // _SHORT_ROWS), [])
        header_at = builder.mul(over_parts.index, ir.Constant(I64, 2 * _SHORT_ROWS))
        rows_at = builder.mul(over_parts.index, ir.Constant(I64, 4 * _SHORT_ROWS))
        loop = Loop(builder, num_blocks, emit.zeros(num_tokens))
        block = builder.add(w, builder.mul(loop.index, ir.Constant(I64, Q4_1_TILE_BYTES)))
        emit.prefetch_all(emit.at(block, _AHEAD_BYTES), Q4_1_TILE_BYTES)
        x_at = builder.mul(loop.index, ir.Constant(I64, 2 * BLOCK))
        scale_at = builder.mul(loop.index, ir.Constant(I64, 8))
        x_rows = [builder.add(emit.step(x, x_stride, n), x_at) for n in range(num_tokens)]
        over_columns = Loop(builder, ir.Constant(I64, BLOCK // 8), [emit.int_zero] * num_tokens)
        at = builder.add(block, builder.mul(over_columns.index, ir.Constant(I64, 4 * LANES)))
        at = emit.at(builder.add(at, rows_at), 4 * LANES)
        in_at = builder.mul(over_columns.index, ir.Constant(I64, 16))
        sums = list(over_columns.carried)
        for place, pairs in enumerate(emit.load_nibble_pairs(at)):
            for n, x_row in enumerate(x_rows):
                inputs = emit.splat_pair(emit.at(builder.add(x_row, in_at), 4 * place))
                sums[n] = emit.add_pair_products(pairs, inputs, sums[n])
        over_columns.close(sums)
        w_scale = emit.load_halves(builder.add(block, header_at))
        minimum = emit.load_halves(emit.at(builder.add(block, header_at), 2 * LANES))
        totals = []
        for n in range(num_tokens):
            at = builder.add(emit.step(scales, scales_stride, n), scale_at)
            scale = builder.fmul(w_scale, emit.load_splat(at))
            total = emit.fma(emit.to_floats(sums[n]), scale, loop.carried[n])
            totals.append(emit.fma(minimum, emit.load_splat(emit.at(at, 4)), total))
        loop.close(totals)
        for n, total in enumerate(totals):
            emit.store(total, builder.add(emit.step(y, y_stride, n), rows_at))
        over_parts.close([])
        return context.get_dummy_value()

    return types.void(tokens, *[types.int64] * 8), generate


@kernel
def _dense_strip(kind, rows, tokens, w, w_stride, x, stride, y, y_stride, count, size):
    """``count`` rows, ``rows`` at once and the rest one by one, for literal ``tokens``."""
    literally(kind)
    literally(rows)
    literally(tokens)
    r = 0
    while r + rows <= count:
        at, to = w + r * w_stride, y + 4 * r
        _dense_products(kind, rows, tokens, at, w_stride, x, stride, to, y_stride, size)
        r += rows
    while r < count:
        at, to = w + r * w_stride, y + 4 * r
        _dense_products(kind, 1, tokens, at, w_stride, x, stride, to, y_stride, size)
        r += 1


@kernel
def _dense_rows(kind, w, x, y, y_stride, first, last, num_tokens, size):
    """Rows ``first`` to ``last`` of a dense matrix; weights leave memory once."""
    literally(kind)
    w_stride = size * (4 if kind == DENSE_F32 else 2)
    stride = 4 * size
    for r in range(first, last, _STRIP_ROWS):
        row, out = w + r * w_stride, y + 4 * r
        count = min(_STRIP_ROWS, last - r)
        for n in range(0, num_tokens, _DENSE_TOKENS):
            at, to, tokens = x + n * stride, out + n * y_stride, min(_DENSE_TOKENS, num_tokens - n)
            if tokens == 1:
                _dense_strip(kind, 4, 1, row, w_stride, at, stride, to, y_stride, count, size)
            elif tokens == 2:
                _dense_strip(
                    kind, _PAIR_ROWS, 2, row, w_stride, at, stride, to, y_stride, count, size
                )
            elif HAS_AVX512:
                if tokens == 3:
                    _dense_strip(kind, 4, 3, row, w_stride, at, stride, to, y_stride, count, size)
                else:
                    _dense_strip(kind, 4, 4, row, w_stride, at, stride, to, y_stride, count, size)


@kernel
def _tile_strip(kind, tokens, w, w_stride, x, stride, sums, s_stride, y, y_stride, count, blocks):
    """``count`` tiles for literal ``tokens``."""
    literally(kind)
    literally(tokens)
    for t in range(count):
        at, to = w + t * w_stride, y + 4 * LANES * t
        if kind == Q4_1_SHORT:
            _short_products(tokens, at, x, stride, sums, s_stride, to, y_stride, blocks)
        else:
            _tile_products(kind, tokens, at, x, stride, sums, s_stride, to, y_stride, blocks)


@kernel
def _tile_rows(kind, w, x, sums, y, y_stride, first, last, num_tokens, size):
    """Tiles ``first`` to ``last`` of a quantised matrix; weights leave memory once."""
    literally(kind)
    blocks = size // BLOCK
    w_stride = blocks * (Q8_0_TILE_BYTES if kind == Q8_0 else Q4_1_TILE_BYTES)
    is_short = kind == Q4_1_SHORT
    stride, s_stride = (2 * size, 8 * blocks) if is_short else (4 * size, 4 * blocks)
    for t in range(first, last, _STRIP_TILES):
        tile, out = w + t * w_stride, y + 4 * LANES * t
        count = min(_STRIP_TILES, last - t)
        for n in range(0, num_tokens, 4):
            at, s_at, to = x + n * stride, sums + n * s_stride, out + n * y_stride
            tokens = min(4, num_tokens - n)
            if tokens == 4:
                _tile_strip(
                    kind, 4, tile, w_stride, at, stride, s_at, s_stride, to, y_stride, count, blocks
                )
            elif tokens == 3:
                _tile_strip(
                    kind, 3, tile, w_stride, at, stride, s_at, s_stride, to, y_stride, count, blocks
                )
            elif tokens == 2:
                _tile_strip(
                    kind, 2, tile, w_stride, at, stride, s_at, s_stride, to, y_stride, count, blocks
                )
            else:
                _tile_strip(
                    kind, 1, tile, w_stride, at, stride, s_at, s_stride, to, y_stride, count, blocks
                )


@kernel
def multiply(matrix, x, sums, y, y_stride, first, last, num_tokens):
    """Some rows of ``y = x @ matrix.T + bias``.

    Args:
        matrix: [5] int64: address, form, rows, columns, address of a float32 bias or 0.
        x: address of [num_tokens, columns] float32; int16 for ``Q4_1_SHORT``.
        sums: address of [num_tokens, columns / 32] float32, sums of the blocks of x; read for Q4_1
            only. For ``Q4_1_SHORT`` [num_tokens, columns / 32, 2], scales and sums.
        y: address of the output; rows are padded to a multiple of sixteen.
        y_stride: bytes between two tokens of the output.
        first: the first tile to compute, sixteen rows each.
        last: the tile behind the last one.
        num_tokens: rows of x.
    """
    w, form, rows, size = matrix[0], matrix[1], matrix[2], matrix[3]
    first_row, last_row = first * LANES, min(last * LANES, rows)
    if form == Q4_1:
        _tile_rows(Q4_1, w, x, sums, y, y_stride, first, last, num_tokens, size)
    elif form == Q4_1_SHORT:
        _tile_rows(Q4_1_SHORT, w, x, sums, y, y_stride, first, last, num_tokens, size)
    elif form == Q8_0:
        _tile_rows(Q8_0, w, x, sums, y, y_stride, first, last, num_tokens, size)
    elif form == DENSE_BF16:
        _dense_rows(DENSE_BF16, w, x, y, y_stride, first_row, last_row, num_tokens, size)
    else:
        _dense_rows(DENSE_F32, w, x, y, y_stride, first_row, last_row, num_tokens, size)
    if matrix[4]:
        bias = carray(pointer(matrix[4]), rows)
        for n in range(num_tokens):
            out = carray(pointer(y + n * y_stride), rows)
            for r in range(first_row, last_row):
                out[r] += bias[r]
