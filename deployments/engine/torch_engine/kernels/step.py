"""The layers, as every thread runs them: each computes its share of a phase, then all meet.

N: tokens of the batch, M: rows whose logits are wanted, E: hidden size, H: heads, K: key-value
heads, D: head dimension, I: intermediate size, V: vocabulary, L: layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deployments.engine.torch_engine.kernels.attention import CHUNK, attend, fetch_rows, join_chunks
from deployments.engine.torch_engine.kernels.compiling import kernel
from deployments.engine.torch_engine.kernels.elementwise import (
    gate,
    normalise,
    rotate,
    round_blocks,
    sum_blocks,
)
from deployments.engine.torch_engine.kernels.memory import (
    ITEMS,
    LINE,
    address,
    bits_of_float,
    next_item,
    wait_for_all,
)
from deployments.engine.torch_engine.kernels.products import multiply
from deployments.engine.torch_engine.kernels.vectors import DENSE_BF16, LANES, Q4_1, SHORT_FORMS

if TYPE_CHECKING:
    from numpy.typing import NDArray

PHASES = 10
"""Times that threads meet in a layer."""
_ITEMS_PER_THREAD = 8
"""Pieces of a product or of attention: enough for the fast to help the slow, few enough to cost
nothing."""


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
    """Activations, shared by all threads unless the first axis is the thread.

    Attributes:
        x: [N, E], the residual stream; holds the embeddings at the start.
        rounded: [N * inputs], a product's inputs as whole numbers.
        sums: of the blocks of a product's inputs; with their scales where they are rounded.
        partial: [N, chunks, H, D + 2], attention over each chunk of a token's context.
        places: [chunks], counting up from 0.
        shares: [threads, chunks].
        scores: [threads, SCORES].
        logits: [M, V or more].
    """

    x: NDArray[np.float32]
    normed: NDArray[np.float32]
    rounded: NDArray[np.int16]
    sums: NDArray[np.float32]
    qkv: NDArray[np.float32]
    partial: NDArray[np.float32]
    places: NDArray[np.int64]
    shares: NDArray[np.float32]
    scores: NDArray[np.float32]
    attended: NDArray[np.float32]
    projected: NDArray[np.float32]
    gate_up: NDArray[np.float32]
    hidden: NDArray[np.float32]
    logits: NDArray[np.float32]


@kernel
def _prepare(matrix, x, first, last, scratch):
    """What ``matrix`` wants of its inputs besides the numbers, for rows ``first`` to ``last``."""
    if matrix[1] == Q4_1:
        sum_blocks(x, first, last, matrix[3], scratch.sums)
    elif matrix[1] in SHORT_FORMS:
        round_blocks(x, first, last, matrix[3], scratch.rounded, scratch.sums)


@kernel
def _apply(matrix, x, num_tokens, scratch, y, items, num_parts):
    """``y = matrix @ x`` together with the other threads; ``x`` is prepared."""
    x_at = address(scratch.rounded) if matrix[1] in SHORT_FORMS else address(x)
    num_tiles = (matrix[2] + LANES - 1) // LANES
    size = max(1, num_tiles // (_ITEMS_PER_THREAD * num_parts))
    first = next_item(items) * size
    while first < num_tiles:
        last = min(first + size, num_tiles)
        y_at, y_stride = address(y), y.shape[1] * 4
        multiply(matrix, x_at, address(scratch.sums), y_at, y_stride, first, last, num_tokens)
        first = next_item(items) * size


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
def _attend(stack, layer, pool, tokens, scratch, items, part, num_parts):
    """``scratch.qkv`` and the pool to ``scratch.partial``, together with the other threads.

    An item is one chunk, with all heads and tokens or a share of them. Rows come from memory once
    for neighbouring tokens of one sequence, all heads of a row together; then they are in the
    nearest caches.
    """
    H, K, D = stack.num_heads, stack.num_kv_heads, stack.head_dim
    G, N = H // K, tokens.slots.shape[0]
    row_bytes = 2 if pool.form == DENSE_BF16 else 4
    stride = K * D * row_bytes
    layer_at = layer * pool.k.shape[1] * stride
    scores, queries = address(scratch.scores[part]), address(scratch.qkv)
    partial, partial_stride = address(scratch.partial), 4 * scratch.partial.shape[3]
    qkv_width, num_kept = scratch.qkv.shape[1], scratch.partial.shape[1]
    scale = np.float32(1.0 / np.sqrt(D))
    num_chunks = (tokens.num_seen.max() + CHUNK - 1) // CHUNK
    # As large as items may be while they keep all threads busy.
    wanted = _ITEMS_PER_THREAD * num_parts
    num_shares = 1 if num_chunks >= wanted else K
    num_groups = min(N, (wanted + num_chunks * num_shares - 1) // (num_chunks * num_shares))
    heads, num_tokens = K // num_shares, (N + num_groups - 1) // num_groups
    num_items = num_chunks * num_shares * num_groups
    item = next_item(items)
    while item < num_items:
        chunk, rest = item // (num_shares * num_groups), item % (num_shares * num_groups)
        share, group = rest // num_groups, rest % num_groups
        start, first = chunk * CHUNK, group * num_tokens
        last = min(first + num_tokens, N)
        while first < last:
            behind = first + 1
            while behind < last and tokens.seen[behind] == tokens.seen[first]:
                behind += 1
            count = min(CHUNK, tokens.num_seen[behind - 1] - start)
            slots, at = tokens.seen[first] + 8 * start, layer_at + share * heads * D * row_bytes
            if count > 0:
                fetch_rows(pool.k_at + at, stride, slots, count, heads * D * row_bytes)
                fetch_rows(pool.v_at + at, stride, slots, count, heads * D * row_bytes)
            for head in range(share * heads, share * heads + heads):
                at = layer_at + head * D * row_bytes
                for n in range(first, behind):
                    if start < tokens.num_seen[n]:
                        attend(
                            pool.form,
                            G,
                            queries + 4 * (n * qkv_width + head * G * D),
                            pool.k_at + at,
                            pool.v_at + at,
                            stride,
                            slots,
                            min(CHUNK, tokens.num_seen[n] - start),
                            D,
                            scale,
                            scores,
                            partial + ((n * num_kept + chunk) * H + head * G) * partial_stride,
                        )
            first = behind
        item = next_item(items)


@kernel
def _join(stack, tokens, scratch, first, last, part):
    """``scratch.partial`` of some tokens to every head of ``scratch.attended``."""
    D = stack.head_dim
    for n in range(first, last):
        num_chunks = (tokens.num_seen[n] + CHUNK - 1) // CHUNK
        for head in range(stack.num_heads):
            join_chunks(
                scratch.partial[n, :, head],
                num_chunks,
                D,
                scratch.places,
                scratch.shares[part],
                scratch.attended[n, head * D : head * D + D],
            )


@kernel
def _add(x, y, first, last):
    size = x.shape[1]
    for n in range(first, last):
        total, more = x[n], y[n]
        for i in range(size):
            total[i] += more[i]


@kernel
def _normalise_rows(x, first, last, weight, eps, out):
    for n in range(first, last):
        normalise(x, n, 0, weight.shape[0], weight, eps, out, n, 0)


@kernel
def run_layers(stack, pool, tokens, scratch, counter, part, num_parts):
    """One thread's part of a forward.

    Threads share what stands between the products by tokens; of products and attention each takes
    one item after the other.

    Args:
        stack: weights.
        pool: KV rows; those at ``tokens.slots`` are written.
        tokens: what to compute.
        scratch: shared by all threads; ``logits`` is the result.
        counter: address of zeros: a barrier, and from ``ITEMS`` on a line for each of its phases.
        part: this thread.
        num_parts: threads that run this together.
    """
    N, E, I = tokens.slots.shape[0], stack.norm.shape[0], scratch.hidden.shape[1]
    first, last = N * part // num_parts, N * (part + 1) // num_parts
    x, normed, hidden, eps = scratch.x, scratch.normed, scratch.hidden, stack.eps
    met, items = 0, counter + ITEMS
    for layer in range(stack.qkv.shape[0]):
        qkv, o, down = stack.qkv[layer], stack.o[layer], stack.down[layer]
        gate_up = stack.gate_up[layer]
        _normalise_rows(x, first, last, stack.input_norm[layer], eps, normed)
        _prepare(qkv, normed, first, last, scratch)
        wait_for_all(counter, num_parts, met + 1)
        _apply(qkv, normed, N, scratch, scratch.qkv, items + 1 * LINE, num_parts)
        wait_for_all(counter, num_parts, met + 2)
        _place_heads(stack, layer, pool, tokens, scratch.qkv, part, num_parts)
        wait_for_all(counter, num_parts, met + 3)
        _attend(stack, layer, pool, tokens, scratch, items + 3 * LINE, part, num_parts)
        wait_for_all(counter, num_parts, met + 4)
        _join(stack, tokens, scratch, first, last, part)
        _prepare(o, scratch.attended, first, last, scratch)
        wait_for_all(counter, num_parts, met + 5)
        _apply(o, scratch.attended, N, scratch, scratch.projected, items + 5 * LINE, num_parts)
        wait_for_all(counter, num_parts, met + 6)
        _add(x, scratch.projected, first, last)
        _normalise_rows(x, first, last, stack.post_attention_norm[layer], eps, normed)
        _prepare(gate_up, normed, first, last, scratch)
        wait_for_all(counter, num_parts, met + 7)
        _apply(gate_up, normed, N, scratch, scratch.gate_up, items + 7 * LINE, num_parts)
        wait_for_all(counter, num_parts, met + 8)
        gate(scratch.gate_up, first, last, I, hidden)
        _prepare(down, hidden, first, last, scratch)
        wait_for_all(counter, num_parts, met + 9)
        _apply(down, hidden, N, scratch, scratch.projected, items + 9 * LINE, num_parts)
        met, items = met + PHASES, items + PHASES * LINE
        wait_for_all(counter, num_parts, met)
        _add(x, scratch.projected, first, last)
    M = tokens.logit_rows.shape[0]
    if M == 0:
        return
    wait_for_all(counter, num_parts, met + 1)
    first, last = M * part // num_parts, M * (part + 1) // num_parts
    for m in range(first, last):
        normalise(x, tokens.logit_rows[m], 0, E, stack.norm, eps, normed, m, 0)
    _prepare(stack.head[0], normed, first, last, scratch)
    wait_for_all(counter, num_parts, met + 2)
    _apply(stack.head[0], normed, M, scratch, scratch.logits, items, num_parts)
