"""The layers, as every thread runs them: each computes its share of a phase, then all meet.

N: tokens of the batch, M: rows whose logits are wanted, E: hidden size, H: heads, K: key-value
heads, D: head dimension, I: intermediate size, V: vocabulary, L: layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deployments.engine.torch_engine.kernels.attention import CHUNK, attend, join_chunks
from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.elementwise import (
    gate,
    normalise,
    rotate,
    round_blocks,
    sum_blocks,
)
from deployments.engine.torch_engine.kernels.memory import bits_of_float, wait_for_all
from deployments.engine.torch_engine.kernels.products import multiply
from deployments.engine.torch_engine.kernels.vectors import DENSE_BF16, LANES, Q4_1, Q4_1_SHORT

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Stack(NamedTuple):
    """A model's weights. A matrix is a row of five numbers, see ``products.multiply``.

    Attributes:
        q_norm: [L, D], or [0, D] for families without norms on their heads.
        input_norm: [L, E].
        qkv: [L, 5].
        head: [1, 5].
        eps: of the norms.
    """

    input_norm: NDArray[np.float32]
    qkv: NDArray[np.int64]
    q_norm: NDArray[np.float32]
    k_norm: NDArray[np.float32]
    o: NDArray[np.int64]
    post_attention_norm: NDArray[np.float32]
    gate_up: NDArray[np.int64]
    down: NDArray[np.int64]
    norm: NDArray[np.float32]
    head: NDArray[np.int64]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: np.float32


class Pool(NamedTuple):
    """The KV pool.

    Attributes:
        k: [L, slots, K * D], float32 or the bits of bfloat16.
        k_at: its address.
        form: of the numbers in it.
    """

    k: NDArray[np.float32] | NDArray[np.uint16]
    v: NDArray[np.float32] | NDArray[np.uint16]
    k_at: int
    v_at: int
    form: int


class Tokens(NamedTuple):
    """What is computed.

    Attributes:
        slots: [N], where the new rows go.
        seen: [N] addresses of int64 slots, the rows each token attends to.
        num_seen: [N].
        cos_sin: [2, N, D / 2].
        logit_rows: [M].
    """

    slots: NDArray[np.int64]
    seen: NDArray[np.int64]
    num_seen: NDArray[np.int64]
    cos_sin: NDArray[np.float32]
    logit_rows: NDArray[np.int64]


class Scratch(NamedTuple):
    """Activations. The first axis of what every thread has for itself is the thread.

    Attributes:
        x: [N, E], the residual stream; holds the embeddings at the start.
        normed: per thread.
        sums: per thread, of the blocks of a product's inputs; with their scales where they are
            rounded.
        rounded: per thread, a product's inputs as whole numbers.
        partial: [N, chunks, H, D + 2], attention over each chunk of a token's context.
        attended: per thread.
        scores: per thread.
        logits: [M, V or more].
    """

    x: NDArray[np.float32]
    normed: NDArray[np.float32]
    sums: NDArray[np.float32]
    rounded: NDArray[np.int16]
    qkv: NDArray[np.float32]
    partial: NDArray[np.float32]
    attended: NDArray[np.float32]
    projected: NDArray[np.float32]
    gate_up: NDArray[np.float32]
    hidden: NDArray[np.float32]
    scores: NDArray[np.float32]
    logits: NDArray[np.float32]


@kernel
def _address(array):
    return np.int64(array.ctypes.data)


@kernel
def _apply(matrix, x, num_tokens, scratch, y, part, num_parts):
    """``y = matrix @ x`` on this thread's rows, which are returned as (first, last)."""
    sums, rounded = scratch.sums[part], scratch.rounded[part]
    x_at = _address(x)
    if matrix[1] == Q4_1:
        sum_blocks(x, num_tokens, matrix[3], sums)
    elif matrix[1] == Q4_1_SHORT:
        round_blocks(x, num_tokens, matrix[3], rounded, sums)
        x_at = _address(rounded)
    y_stride = y.shape[1] * 4
    return multiply(
        matrix, x_at, _address(sums), _address(y), y_stride, part, num_parts, num_tokens
    )


@kernel
def _to_bfloat16(number):
    """The upper half of the bits, rounded to nearest, ties to even."""
    bits = bits_of_float(np.float32(number))
    return np.uint16((bits + np.int32(0x7FFF) + ((bits >> 16) & 1)) >> 16)


@kernel
def _store_head(pool_rows, form, slot, column, x, row, start, size):
    for i in range(size):
        if form == DENSE_BF16:
            pool_rows[slot, column + i] = _to_bfloat16(x[row, start + i])
        else:
            pool_rows[slot, column + i] = x[row, start + i]


@kernel
def _place_heads(stack, layer, pool, tokens, qkv, part, num_parts):
    """Norm and rotate this thread's heads, and write its keys and values to the pool."""
    H, K, D = stack.num_heads, stack.num_kv_heads, stack.head_dim
    has_norms = stack.q_norm.shape[0] > 0
    num_items = tokens.slots.shape[0] * (H + 2 * K)
    for item in range(num_items * part // num_parts, num_items * (part + 1) // num_parts):
        n, head = item // (H + 2 * K), item % (H + 2 * K)
        start = head * D
        if head < H + K:
            if has_norms:
                weight = stack.q_norm[layer] if head < H else stack.k_norm[layer]
                normalise(qkv, n, start, D, weight, stack.eps, qkv, n, start)
            rotate(qkv, n, start, D, tokens.cos_sin)
        if head >= H:
            kept = pool.k if head < H + K else pool.v
            _store_head(
                kept[layer], pool.form, tokens.slots[n], (head - H) % K * D, qkv, n, start, D
            )


@kernel
def _attend(stack, layer, pool, tokens, scratch, part, num_parts):
    """``scratch.qkv`` and the pool to this thread's pieces of ``scratch.partial``.

    A piece is one chunk of one token's context. Neighbouring pieces read the same rows if their
    tokens belong to one sequence. Threads take turns, because contexts differ in length.
    """
    H, K, D = stack.num_heads, stack.num_kv_heads, stack.head_dim
    G, N = H // K, tokens.slots.shape[0]
    row_bytes = 2 if pool.form == DENSE_BF16 else 4
    layer_at = layer * pool.k.shape[1] * K * D * row_bytes
    scores = scratch.scores[part]
    scale = np.float32(1.0 / np.sqrt(D))
    for item in range(part, scratch.partial.shape[1] * N, num_parts):
        chunk, n = item // N, item % N
        start = chunk * CHUNK
        if start >= tokens.num_seen[n]:
            continue
        for head in range(K):
            at = layer_at + head * D * row_bytes
            attend(
                pool.form,
                G,
                _address(scratch.qkv) + 4 * (n * scratch.qkv.shape[1] + head * G * D),
                pool.k_at + at,
                pool.v_at + at,
                K * D * row_bytes,
                tokens.seen[n] + 8 * start,
                min(CHUNK, tokens.num_seen[n] - start),
                D,
                scale,
                scores,
                _address(scores),
                scratch.partial[n, chunk, head * G : head * G + G],
            )


@kernel
def _join(stack, tokens, scratch, attended):
    """``scratch.partial`` to every head of ``attended``."""
    D = stack.head_dim
    for n in range(tokens.slots.shape[0]):
        num_chunks = (tokens.num_seen[n] + CHUNK - 1) // CHUNK
        for head in range(stack.num_heads):
            partial, out = scratch.partial[n, :, head], attended[n, head * D : head * D + D]
            join_chunks(partial, num_chunks, D, out)


@kernel
def _add(x, y, num_tokens, first, last):
    for n in range(num_tokens):
        for i in range(first, last):
            x[n, i] += y[n, i]


@kernel
def _normalise_rows(x, num_rows, weight, eps, out):
    for n in range(num_rows):
        normalise(x, n, 0, weight.shape[0], weight, eps, out, n, 0)


@kernel
def run_layers(stack, pool, tokens, scratch, counter, part, num_parts):
    """One thread's part of a forward.

    Args:
        stack: weights.
        pool: KV rows; those at ``tokens.slots`` are written.
        tokens: what to compute.
        scratch: shared by all threads; ``logits`` is the result.
        counter: address of an int64 of value 0.
        part: this thread.
        num_parts: threads that run this together.
    """
    N, E, I = tokens.slots.shape[0], stack.norm.shape[0], scratch.hidden.shape[1]
    normed, attended = scratch.normed[part], scratch.attended[part]
    met = 0
    for layer in range(stack.qkv.shape[0]):
        _normalise_rows(scratch.x, N, stack.input_norm[layer], stack.eps, normed)
        _apply(stack.qkv[layer], normed, N, scratch, scratch.qkv, part, num_parts)
        wait_for_all(counter, num_parts, met + 1)
        _place_heads(stack, layer, pool, tokens, scratch.qkv, part, num_parts)
        wait_for_all(counter, num_parts, met + 2)
        _attend(stack, layer, pool, tokens, scratch, part, num_parts)
        wait_for_all(counter, num_parts, met + 3)
        # Every thread needs all heads: to join them again costs less than to meet once more.
        _join(stack, tokens, scratch, attended)
        first, last = _apply(
            stack.o[layer], attended, N, scratch, scratch.projected, part, num_parts
        )
        _add(scratch.x, scratch.projected, N, first, last)
        wait_for_all(counter, num_parts, met + 4)
        _normalise_rows(scratch.x, N, stack.post_attention_norm[layer], stack.eps, normed)
        _apply(stack.gate_up[layer], normed, N, scratch, scratch.gate_up, part, num_parts)
        wait_for_all(counter, num_parts, met + 5)
        # Whole vectors, or a column's code would depend on where another thread begins.
        num_vectors = I // LANES
        first = num_vectors * part // num_parts * LANES
        last = num_vectors * (part + 1) // num_parts * LANES
        gate(scratch.gate_up, N, I, first, last, scratch.hidden)
        wait_for_all(counter, num_parts, met + 6)
        first, last = _apply(
            stack.down[layer], scratch.hidden, N, scratch, scratch.projected, part, num_parts
        )
        _add(scratch.x, scratch.projected, N, first, last)
        met += 7
        wait_for_all(counter, num_parts, met)
    M = tokens.logit_rows.shape[0]
    for m in range(M):
        normalise(scratch.x, tokens.logit_rows[m], 0, E, stack.norm, stack.eps, normed, m, 0)
    _apply(stack.head[0], normed, M, scratch, scratch.logits, part, num_parts)
