"""Attention over rows of the KV pool, read where they lie.

A context is cut into chunks of ``CHUNK`` rows. All query heads of one key-value head go through a
chunk together, so that a row is read and widened once for them; a token's chunks are independent
pieces of work, which are put together at the end. What is summed in which order depends on the
place of the rows in their context only.

D: head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import carray, literally, types
from numba.extending import intrinsic

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.elementwise import exponential
from deployments.engine.torch_engine.kernels.memory import LINE, address, pointer
from deployments.engine.torch_engine.kernels.vectors import (
    DENSE_BF16,
    DENSE_F32,
    F32,
    HAS_AVX512,
    I64,
    LANES,
    Emitter,
    Loop,
    Value,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

CHUNK = 64
"""Rows whose scores are kept at once."""
PARTIAL_EXTRA = 2
"""Numbers behind the D of a partial result: the highest score, and the sum of the weights."""

_ROW_BYTES = {DENSE_F32: 4, DENSE_BF16: 2}
_SCORED = 8
"""Lanes of a score: of wider ones the sums over lanes would cost what the products gain."""
_MIXED = LANES if HAS_AVX512 else 8
"""Lanes of a weighted sum."""
_FEWEST = LANES // _MIXED
_ROWS = 4
"""Rows that are scored at once: with three heads, twelve of AVX2's sixteen registers are sums."""
SCORES = 3 * (CHUNK + _ROWS) + LINE // 4
"""Numbers that one thread keeps of three heads: their scores, and the highest ones. What is left
keeps threads from writing to one line of the cache."""


@intrinsic(prefer_literal=True)
def _score_rows(
    typing_context, kind, heads, query, keys, stride, slots, count, size, scores, highest
):
    """``scores[h][i] = query[h] * keys[slots[i]]``, and the highest of each head."""
    num_heads, form = heads.literal_value, kind.literal_value

    def generate(context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        emit = Emitter(builder, _SCORED)
        _, _, query, keys, stride, slots, count, size, scores, highest = args
        four = ir.VectorType(F32, _ROWS)
        lowest = ir.Constant(four, [float("-inf")] * _ROWS)
        rounds = builder.sdiv(builder.add(count, ir.Constant(I64, _ROWS - 1)), _int(_ROWS))
        last = builder.sub(count, _int(1))
        over_rows = Loop(builder, rounds, [lowest] * num_heads)
        first = builder.mul(over_rows.index, _int(_ROWS))
        rows = []
        for r in range(_ROWS):
            index = builder.add(first, _int(r))
            # The last row is scored again where there are fewer; nobody reads those scores.
            index = builder.select(builder.icmp_signed("<", index, last), index, last)
            rows.append(_row(emit, index, slots, keys, stride))
        over_size = Loop(builder, builder.sdiv(size, _int(_SCORED)), emit.zeros(_ROWS * num_heads))
        step = builder.mul(over_size.index, _int(_SCORED))
        at, row_at = builder.mul(step, _int(4)), builder.mul(step, _int(_ROW_BYTES[form]))
        query_at = builder.add(query, at)
        queries = [
            emit.load_floats(builder.add(query_at, builder.mul(size, _int(4 * h))), DENSE_F32)
            for h in range(num_heads)
        ]
        sums = []
        for r, row in enumerate(rows):
            key = emit.load_floats(builder.add(row, row_at), form)
            sums += [
                emit.fma(queries[h], key, over_size.carried[r * num_heads + h])
                for h in range(num_heads)
            ]
        over_size.close(sums)
        best = []
        for h in range(num_heads):
            found = emit.total_each(sums[h::num_heads])
            at = builder.add(builder.mul(first, _int(4)), _int(4 * h * CHUNK))
            emit.store(found, builder.add(scores, at))
            is_higher = builder.fcmp_ordered(">", found, over_rows.carried[h])
            best.append(builder.select(is_higher, found, over_rows.carried[h]))
        over_rows.close(best)
        for h in range(num_heads):
            emit.store(best[h], emit.at(highest, 4 * _ROWS * h))
        return context.get_dummy_value()

    return types.void(kind, heads, *[types.int64] * 8), generate


@intrinsic(prefer_literal=True)
def _mix_rows(
    typing_context, kind, heads, width, weights, values, stride, slots, count, out, out_stride
):
    """``out[h] = sum(weights[h][i] * values[slots[i]])`` over ``width`` * 8 dimensions."""
    num_heads, num_vectors, form = heads.literal_value, width.literal_value, kind.literal_value

    def generate(context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        emit = Emitter(builder, _MIXED)
        _, _, _, weights, values, stride, slots, count, out, out_stride = args
        loop = Loop(builder, count, emit.zeros(num_heads * num_vectors))
        row = _row(emit, loop.index, slots, values, stride)
        weight_at = builder.add(weights, builder.mul(loop.index, _int(4)))
        shares = [emit.load_splat(emit.at(weight_at, 4 * h * CHUNK)) for h in range(num_heads)]
        sums = []
        for v in range(num_vectors):
            value = emit.load_floats(emit.at(row, _ROW_BYTES[form] * _MIXED * v), form)
            for h, share in enumerate(shares):
                sums.append(emit.fma(share, value, loop.carried[v * num_heads + h]))
        loop.close(sums)
        for v in range(num_vectors):
            for h in range(num_heads):
                at = emit.step(emit.at(out, 4 * _MIXED * v), out_stride, h)
                emit.store(sums[v * num_heads + h], at)
        return context.get_dummy_value()

    return types.void(kind, heads, width, *[types.int64] * 7), generate


def _int(value: int) -> Value:
    return ir.Constant(I64, value)


def _row(emit: Emitter, index: Value, slots: Value, base: Value, stride: Value) -> Value:
    builder = emit.builder
    at = builder.add(slots, builder.mul(index, _int(8)))
    return builder.add(base, builder.mul(emit.load(at, I64, 8), stride))


@intrinsic
def fetch_rows(typing_context, base, stride, slots, count, num_bytes):
    """Ask for the beginning of ``count`` rows at once: to wait for each in turn takes longer.

    Sizes are in bytes; ``slots`` is the address of int64.
    """

    def generate(context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        emit = Emitter(builder)
        base, stride, slots, count, num_bytes = args
        over_rows = Loop(builder, count, [])
        row = _row(emit, over_rows.index, slots, base, stride)
        num_lines = builder.sdiv(builder.add(num_bytes, _int(LINE - 1)), _int(LINE))
        over_lines = Loop(builder, num_lines, [])
        emit.prefetch(builder.add(row, builder.mul(over_lines.index, _int(LINE))))
        over_lines.close([])
        over_rows.close([])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@kernel
def _attend_heads(kind, heads, query, keys, values, stride, slots, count, size, scale, scores, out):
    """``heads`` neighbouring query heads; ``out`` is [heads, D + PARTIAL_EXTRA]."""
    literally(kind)
    literally(heads)
    highest = scores + 4 * heads * CHUNK
    _score_rows(kind, heads, query, keys, stride, slots, count, size, scores, highest)
    out_stride = 4 * (size + PARTIAL_EXTRA)
    for h in range(heads):
        found = carray(pointer(highest + 4 * _ROWS * h), _ROWS)
        best = found[0]
        for i in range(1, _ROWS):
            best = max(best, found[i])
        total, own = np.float32(0), carray(pointer(scores + 4 * h * CHUNK), count)
        for i in range(count):
            own[i] = exponential((own[i] - best) * scale)
            total += own[i]
        extra = carray(pointer(out + h * out_stride + 4 * size), PARTIAL_EXTRA)
        extra[0], extra[1] = best * scale, total
    row_bytes = 4 if kind == DENSE_F32 else 2
    start = 0
    while start + 4 * _MIXED <= size:
        _mix_rows(
            kind, heads, 4, scores, values + row_bytes * start, stride, slots, count,
            out + 4 * start, out_stride,
        )  # fmt: skip
        start += 4 * _MIXED
    while start < size:
        _mix_rows(
            kind, heads, _FEWEST, scores, values + row_bytes * start, stride, slots, count,
            out + 4 * start, out_stride,
        )  # fmt: skip
        start += LANES


@kernel
def _attend_group(
    kind, num_heads, query, keys, values, stride, slots, count, size, scale, scores, out
):
    literally(kind)
    h = 0
    while h < num_heads:
        at, part = query + 4 * h * size, out + 4 * h * (size + PARTIAL_EXTRA)
        if h + 3 <= num_heads:
            _attend_heads(
                kind, 3, at, keys, values, stride, slots, count, size, scale, scores, part
            )
            h += 3
        elif h + 2 <= num_heads:
            _attend_heads(
                kind, 2, at, keys, values, stride, slots, count, size, scale, scores, part
            )
            h += 2
        else:
            _attend_heads(
                kind, 1, at, keys, values, stride, slots, count, size, scale, scores, part
            )
            h += 1


@kernel
def attend(form, num_heads, query, keys, values, stride, slots, count, size, scale, scores, out):
    """One token's query heads of one key-value head over at most ``CHUNK`` rows.

    All arrays are addresses: threads that share an array would wait for each other to count who
    uses it.

    Args:
        form: of the pool's rows.
        num_heads: query heads that share the key-value head.
        query: of [num_heads, D] float32, rotated.
        keys: of this head's part of the row at slot 0.
        values: likewise.
        stride: bytes between two slots.
        slots: of [count] int64, the rows that are seen.
        count: their number, at least 1.
        size: D, a multiple of sixteen.
        scale: of the scores.
        scores: of [SCORES] float32, overwritten.
        out: of [num_heads, D + PARTIAL_EXTRA] float32: per head the weighted sum of the values,
            the highest score, and the sum of the weights.
    """
    if form == DENSE_BF16:
        _attend_group(
            DENSE_BF16, num_heads, query, keys, values, stride, slots, count, size, scale, scores,
            out,
        )  # fmt: skip
    else:
        _attend_group(
            DENSE_F32, num_heads, query, keys, values, stride, slots, count, size, scale, scores,
            out,
        )  # fmt: skip


@kernel
def join_chunks(partial, count, size, places, shares, out):
    """One head's attention from that over its chunks.

    Args:
        partial: [chunks or more, D + PARTIAL_EXTRA] float32, what ``attend`` gave; a view whose
            rows are evenly spaced.
        count: chunks.
        size: D.
        places: [chunks or more] int64, counting up from 0.
        shares: [chunks or more] float32, overwritten.
        out: [D] float32, contiguous.
    """
    best = partial[0, size]
    for c in range(1, count):
        best = max(best, partial[c, size])
    total = np.float32(0)
    for c in range(count):
        shares[c] = exponential(partial[c, size] - best)
        total += shares[c] * partial[c, size + 1]
    for c in range(count):
        shares[c] /= total
    stride, start, out_at = partial.strides[0], 0, address(out)
    shares_at, places_at, values = address(shares), address(places), address(partial)
    while start < size:
        _mix_rows(
            DENSE_F32, 1, _FEWEST, shares_at, values + 4 * start, stride, places_at, count,
            out_at + 4 * start, 0,
        )  # fmt: skip
        start += LANES
