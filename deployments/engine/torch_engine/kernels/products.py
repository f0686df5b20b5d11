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
from deployments.engine.torch_engine.kernels.dense import multiply_rows
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
    Q8_0_SHORT,
    Q8_0_TILE_BYTES,
    SHORT_FORMS,
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
_AHEAD_BYTES = 2048
"""How far ahead tiles are fetched: the more tokens use one, the later the processor would ask."""
_STRIP_TILES = 4
"""What is multiplied with all tokens before the next comes: it stays in the nearest caches."""


@intrinsic(prefer_literal=True)
def _tile_products(
    typing_context, kind, tokens, w, x, x_stride, sums, sums_stride, y, y_stride, num_blocks
):
    """The same for one quantised tile of sixteen rows; lanes are rows."""
    form = kind.literal_value
    write = _write_short_tile if form in SHORT_FORMS else _write_tile

    def generate(context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        write(builder, form, tokens.literal_value, *args[2:])
        return context.get_dummy_value()

    return types.void(kind, tokens, *[types.int64] * 8), generate


def _write_tile(
    builder: Value,
    form: int,
    num_tokens: int,
    w: Value,
    x: Value,
    x_stride: Value,
    sums: Value,
    sums_stride: Value,
    y: Value,
    y_stride: Value,
    num_blocks: Value,
) -> None:
    """``sums`` holds the sum of each block of x, which a block's minimum is multiplied with."""
    emit = Emitter(builder)
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


def _tile_columns(emit: Emitter, form: int, block: Value) -> Iterator[tuple[int, Value]]:
    """Columns of a tile's block and their numbers."""
    if form == Q8_0:
        for column in range(0, BLOCK, 2):
            pairs = emit.load_byte_pairs(emit.at(block, LANES * (2 + column)))
            yield from enumerate(emit.split_pairs(pairs), start=column)
        return
    for first in range(0, BLOCK, 8):
        nibbles = emit.load_nibbles(emit.at(block, LANES * (4 + first // 2)))
        yield from zip(_NIBBLE_COLUMNS[first // 8], nibbles, strict=True)


def _write_short_tile(
    builder: Value,
    form: int,
    num_tokens: int,
    w: Value,
    x: Value,
    x_stride: Value,
    scales: Value,
    scales_stride: Value,
    y: Value,
    y_stride: Value,
    num_blocks: Value,
) -> None:
    """For inputs from ``round_blocks``; sums within a block are exact.

    ``scales`` holds the scale and the sum of each block of x.
    """
    has_minimum = form == Q4_1_SHORT
    header_bytes, tile_bytes, columns_bytes = (
        (4 * LANES, Q4_1_TILE_BYTES, 4 * LANES)
        if has_minimum
        else (2 * LANES, Q8_0_TILE_BYTES, 8 * LANES)
    )
    emit = Emitter(builder, _SHORT_ROWS)
    over_parts = Loop(builder, ir.Constant(I64, LANES // _SHORT_ROWS), [])
    first_row = builder.mul(over_parts.index, ir.Constant(I64, _SHORT_ROWS))
    loop = Loop(builder, num_blocks, emit.zeros(num_tokens))
    block = builder.add(w, builder.mul(loop.index, ir.Constant(I64, tile_bytes)))
    emit.prefetch_all(emit.at(block, _AHEAD_BYTES), tile_bytes)
    x_at = builder.mul(loop.index, ir.Constant(I64, 2 * BLOCK))
    scale_at = builder.mul(loop.index, ir.Constant(I64, 8))
    x_rows = [builder.add(emit.step(x, x_stride, n), x_at) for n in range(num_tokens)]
    over_columns = Loop(builder, ir.Constant(I64, BLOCK // 8), [emit.int_zero] * num_tokens)
    at = emit.at(emit.step(block, over_columns.index, columns_bytes), header_bytes)
    in_at = builder.mul(over_columns.index, ir.Constant(I64, 16))
    sums = list(over_columns.carried)
    for place, pairs in enumerate(_eight_columns(emit, form, at, first_row)):
        for n, x_row in enumerate(x_rows):
            inputs = emit.splat_pair(emit.at(builder.add(x_row, in_at), 4 * place))
            sums[n] = emit.add_pair_products(pairs, inputs, sums[n])
    over_columns.close(sums)
    header = emit.step(block, first_row, 2)
    scale = emit.load_halves(header)
    totals = []
    for n in range(num_tokens):
        at = builder.add(emit.step(scales, scales_stride, n), scale_at)
        factor = builder.fmul(scale, emit.load_splat(at))
        total = emit.fma(emit.to_floats(sums[n]), factor, loop.carried[n])
        if has_minimum:
            minimum = emit.load_halves(emit.at(header, 2 * LANES))
            total = emit.fma(minimum, emit.load_splat(emit.at(at, 4)), total)
        totals.append(total)
    loop.close(totals)
    for n, total in enumerate(totals):
        emit.store(total, emit.step(emit.step(y, y_stride, n), first_row, 4))
    over_parts.close([])


def _eight_columns(emit: Emitter, form: int, at: Value, first_row: Value) -> list[Value]:
    """Four pairs of neighbouring columns of a tile's block, of the rows from ``first_row`` on."""
    if form == Q4_1_SHORT:
        return emit.load_nibble_pairs(emit.step(at, first_row, 4))
    at = emit.step(at, first_row, 2)
    return [emit.load_byte_pairs(emit.at(at, 2 * LANES * pair)) for pair in range(4)]


@kernel
def _tile_strip(kind, tokens, w, w_stride, x, stride, sums, s_stride, y, y_stride, count, blocks):
    """``count`` tiles for literal ``tokens``."""
    literally(kind)
    literally(tokens)
    for t in range(count):
        at, to = w + t * w_stride, y + 4 * LANES * t
        _tile_products(kind, tokens, at, x, stride, sums, s_stride, to, y_stride, blocks)


@kernel
def _num_together(num_tokens):
    """How many of so many tokens meet a tile at once."""
    if HAS_AVX512 and num_tokens >= 8:
        return 8
    return min(4, num_tokens)


@kernel
def _tile_rows(kind, w, x, sums, y, y_stride, first, last, num_tokens, size):
    """Tiles ``first`` to ``last`` of a quantised matrix; weights leave memory once."""
    literally(kind)
    blocks = size // BLOCK
    has_bytes = kind in (Q8_0, Q8_0_SHORT)
    w_stride = blocks * (Q8_0_TILE_BYTES if has_bytes else Q4_1_TILE_BYTES)
    is_short = kind in SHORT_FORMS
    stride, s_stride = (2 * size, 8 * blocks) if is_short else (4 * size, 4 * blocks)
    for t in range(first, last, _STRIP_TILES):
        tile, out = w + t * w_stride, y + 4 * LANES * t
        count = min(_STRIP_TILES, last - t)
        n = 0
        while n < num_tokens:
            at, s_at, to = x + n * stride, sums + n * s_stride, out + n * y_stride
            tokens = _num_together(num_tokens - n)
            if tokens == 8:
                if HAS_AVX512:
                    _tile_strip(
                        kind, 8, tile, w_stride, at, stride, s_at, s_stride, to, y_stride, count,
                        blocks,
                    )  # fmt: skip
            elif tokens == 4:
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
            n += tokens


@kernel
def multiply(matrix, x, sums, y, y_stride, first, last, num_tokens):
    """Some rows of ``y = x @ matrix.T + bias``.

    Args:
        matrix: [5] int64: address, form, rows, columns, address of a float32 bias or 0.
        x: address of [num_tokens, columns] float32; int16 for the short forms.
        sums: address of [num_tokens, columns / 32] float32, sums of the blocks of x; read for Q4_1
            only. For the short forms [num_tokens, columns / 32, 2], scales and sums.
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
    elif form == Q8_0_SHORT:
        _tile_rows(Q8_0_SHORT, w, x, sums, y, y_stride, first, last, num_tokens, size)
    elif form == Q8_0:
        _tile_rows(Q8_0, w, x, sums, y, y_stride, first, last, num_tokens, size)
    elif form == DENSE_BF16:
        multiply_rows(DENSE_BF16, w, x, y, y_stride, first_row, last_row, num_tokens, size)
    else:
        multiply_rows(DENSE_F32, w, x, y, y_stride, first_row, last_row, num_tokens, size)
    if matrix[4]:
        bias = carray(pointer(matrix[4]), rows)
        for n in range(num_tokens):
            out = carray(pointer(y + n * y_stride), rows)
            for r in range(first_row, last_row):
                out[r] += bias[r]
