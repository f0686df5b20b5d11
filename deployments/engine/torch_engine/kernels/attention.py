"""Attention of one query head over rows of the KV pool, read where they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import literally, types
from numba.extending import intrinsic

from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.elementwise import exponential
from deployments.engine.torch_engine.kernels.vectors import (
    DENSE_BF16,
    DENSE_F32,
    F32,
    I64,
    LANES,
    Emitter,
    Loop,
    Value,
    zeros,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROW_BYTES = {DENSE_F32: 4, DENSE_BF16: 2}


@intrinsic(prefer_literal=True)
def _score_keys(typing_context, kind, width, query, keys, stride, slots, count, scores):
    """``scores[i] += query * keys[slots[i]]`` over ``width`` * 16 dimensions."""
    num_vectors, dtype = width.literal_value, kind.literal_value

    def generate(context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        emit = Emitter(builder)
        _, _, query, keys, stride, slots, count, scores = args
        queries = [
            emit.load_floats(emit.at(query, 4 * LANES * v), DENSE_F32) for v in range(num_vectors)
        ]
        loop = Loop(builder, count, [])
        row = _row(emit, loop.index, slots, keys, stride)
        products = [
            builder.fmul(q, emit.load_floats(emit.at(row, _ROW_BYTES[dtype] * LANES * v), dtype))
            for v, q in enumerate(queries)
        ]
        while len(products) > 1:
            products = [
                builder.fadd(a, b) for a, b in zip(products[::2], products[1::2], strict=True)
            ]
        target = builder.add(scores, builder.mul(loop.index, ir.Constant(I64, 4)))
        emit.store(builder.fadd(emit.load(target, F32, 4), emit.total(products[0])), target)
        loop.close([])
        return context.get_dummy_value()

    return types.void(kind, width, *[types.int64] * 6), generate


@intrinsic(prefer_literal=True)
def _mix_values(typing_context, kind, width, weights, values, stride, slots, count, out):
    """``out = sum(weights[i] * values[slots[i]])`` over ``width`` * 16 dimensions."""
    num_vectors, dtype = width.literal_value, kind.literal_value

    def generate(context: Any, builder: Value, _signature: Any, args: Sequence[Value]) -> Value:
        emit = Emitter(builder)
        _, _, weights, values, stride, slots, count, out = args
        loop = Loop(builder, count, zeros(num_vectors))
        row = _row(emit, loop.index, slots, values, stride)
        at = builder.mul(loop.index, ir.Constant(I64, 4))
        weight = emit.load_splat(builder.add(weights, at))
        sums = [
            emit.fma(
                weight,
                emit.load_floats(emit.at(row, _ROW_BYTES[dtype] * LANES * v), dtype),
                carried,
            )
            for v, carried in enumerate(loop.carried)
        ]
        loop.close(sums)
        for v, total in enumerate(sums):
            emit.store(total, emit.at(out, 4 * LANES * v))
        return context.get_dummy_value()

    return types.void(kind, width, *[types.int64] * 6), generate


def _row(emit: Emitter, index: Value, slots: Value, base: Value, stride: Value) -> Value:
    builder = emit.builder
    at = builder.add(slots, builder.mul(index, ir.Constant(I64, 8)))
    return builder.add(base, builder.mul(emit.load(at, I64, 8), stride))


@kernel
def _attend(kind, query, keys, values, stride, slots, count, size, scale, scores, scores_at, out):
    literally(kind)
    row_bytes = 4 if kind == DENSE_F32 else 2
    scores[:count] = 0
    start = 0
    while start + 4 * LANES <= size:
        _score_keys(
            kind, 4, query + 4 * start, keys + row_bytes * start, stride, slots, count, scores_at
        )
        start += 4 * LANES
    while start < size:
        _score_keys(
            kind, 1, query + 4 * start, keys + row_bytes * start, stride, slots, count, scores_at
        )
        start += LANES
    best = scores[0]
    for i in range(1, count):
        best = max(best, scores[i])
    total = np.float32(0)
    for i in range(count):
        scores[i] = exponential((scores[i] - best) * scale)
        total += scores[i]
    share = np.float32(1) / total
    for i in range(count):
        scores[i] *= share
    start = 0
    while start + 4 * LANES <= size:
        _mix_values(
            kind, 4, scores_at, values + row_bytes * start, stride, slots, count, out + 4 * start
        )
        start += 4 * LANES
    while start < size:
        _mix_values(
            kind, 1, scores_at, values + row_bytes * start, stride, slots, count, out + 4 * start
        )
        start += LANES


@kernel
def attend(form, query, keys, values, stride, slots, count, size, scale, scores, scores_at, out):
    """Softmax attention of one head of one token.

    Args:
        form: of the pool's rows.
        query: address of [size] float32, rotated.
        keys: address of this head's part of the row at slot 0.
        values: likewise.
        stride: bytes between two slots.
        slots: address of [count] int64, the rows that are seen.
        count: their number, at least 1.
        size: of a head, a multiple of sixteen.
        scale: of the scores.
        scores: [count or more] float32, overwritten.
        scores_at: its address.
        out: address of [size] float32.
    """
    if form == DENSE_BF16:
        _attend(
            DENSE_BF16, query, keys, values, stride, slots, count, size, scale, scores, scores_at,
            out,
        )  # fmt: skip
    else:
        _attend(
            DENSE_F32, query, keys, values, stride, slots, count, size, scale, scores, scores_at,
            out,
        )  # fmt: skip
