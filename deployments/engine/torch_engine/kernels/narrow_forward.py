"""Joins a model, a KV pool and the compiled layers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch.nn import functional as F

from deployments.engine.torch_engine.kernels.attention import CHUNK, PARTIAL_EXTRA
from deployments.engine.torch_engine.kernels.packing import matrix_row
from deployments.engine.torch_engine.kernels.step import Pool, Scratch, Stack, Tokens, run_layers
from deployments.engine.torch_engine.kernels.vectors import BLOCK, DENSE_BF16, DENSE_F32, LANES
from deployments.engine.torch_engine.models.llama import DecoderLayer, Weight
from deployments.engine.torch_engine.rotary import rotation_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
    from deployments.engine.torch_engine.kv_cache import KVCache
    from deployments.engine.torch_engine.models.llama import Model, RMSNorm

_CHUNKS_STEP = 16
_MAX_TOKENS = {
    (torch.float32, False): 16,
    (torch.float32, True): 32,
    (torch.bfloat16, False): 4,
    (torch.bfloat16, True): 16,
}
"""By dtype and whether the weights are packed: beyond, the matrix units win (measured)."""


def _padded(rows: int) -> int:
    return -(-rows // LANES) * LANES


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().to(torch.float32).contiguous().numpy()
    return array


class NarrowForward:
    """Forwards of at most ``max_tokens`` tokens. Belongs to the engine thread."""

    def __init__(self, model: Model, kv_cache: KVCache, max_tokens: int, num_threads: int) -> None:
        config = model.config
        self.max_tokens = max_tokens
        self._model = model
        self._kv_cache = kv_cache
        self._num_threads = num_threads
        self._others = ThreadPoolExecutor(num_threads - 1, "narrow") if num_threads > 1 else None
        self._counter = np.zeros(8, dtype=np.int64)
        self._kept: list[NDArray[np.float32]] = []
        self._stack = self._stack_of(model)
        self._pool = _pool_of(kv_cache)
        widest = max(
            config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size
        )
        qkv_rows = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim

        def rows(width: int) -> NDArray[np.float32]:
            return np.zeros((max_tokens, width), dtype=np.float32)

        self._scratch = Scratch(
            x=rows(config.hidden_size),
            normed=np.zeros((num_threads, max_tokens, config.hidden_size), dtype=np.float32),
            sums=np.zeros((num_threads, 2 * max_tokens * (widest // BLOCK + 1)), dtype=np.float32),
            rounded=np.zeros((num_threads, max_tokens * widest), dtype=np.int16),
            qkv=rows(_padded(qkv_rows)),
            partial=self._partial(_CHUNKS_STEP),
            attended=np.zeros(
                (num_threads, max_tokens, config.num_heads * config.head_dim), dtype=np.float32
            ),
            projected=rows(_padded(config.hidden_size)),
            gate_up=rows(_padded(2 * config.intermediate_size)),
            hidden=rows(config.intermediate_size),
            scores=np.zeros((num_threads, 3 * CHUNK), dtype=np.float32),
            logits=rows(_padded(config.vocab_size)),
        )

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As ``ModelRunner.forward``; the result is the caller's."""
        num_tokens, num_logits = batch.token_ids.shape[0], batch.logit_rows.shape[0]
        scratch = self._scratch
        embedded = F.embedding(batch.token_ids, self._model.embed_tokens.weight)
        torch.from_numpy(scratch.x)[:num_tokens] = embedded
        seen = [rows for span in batch.spans for rows in _seen_rows(span)]
        num_chunks = -(-max(rows.shape[0] for rows in seen) // CHUNK)
        if num_chunks > scratch.partial.shape[1]:
            num_chunks = -(-num_chunks // _CHUNKS_STEP) * _CHUNKS_STEP
            self._scratch = scratch = scratch._replace(partial=self._partial(num_chunks))
        frequencies: Tensor = self._model.get_buffer("rope_frequencies")
        amplitude = self._model.config.rope.amplitude
        table = rotation_table(batch.positions, frequencies, amplitude, torch.float32)
        tokens = Tokens(
            slots=batch.slots.contiguous().numpy(),
            seen=np.array([rows.data_ptr() for rows in seen], dtype=np.int64),
            num_seen=np.array([rows.shape[0] for rows in seen], dtype=np.int64),
            cos_sin=table.squeeze(2).numpy(),
            logit_rows=batch.logit_rows.contiguous().numpy(),
        )
        self._run(tokens)
        return torch.from_numpy(scratch.logits)[
            :num_logits, : self._model.config.vocab_size
        ].clone()

    def _run(self, tokens: Tokens) -> None:
        self._counter[0] = 0
        shared = (self._stack, self._pool, tokens, self._scratch, self._counter.ctypes.data)
        if self._others is None:
            run_layers(*shared, 0, 1)
            return
        running = [
            self._others.submit(run_layers, *shared, part, self._num_threads)
            for part in range(1, self._num_threads)
        ]
        run_layers(*shared, 0, self._num_threads)
        for future in running:
            future.result()

    def _partial(self, num_chunks: int) -> NDArray[np.float32]:
        config = self._model.config
        size = config.head_dim + PARTIAL_EXTRA
        shape = (self.max_tokens, num_chunks, config.num_heads, size)
        return np.zeros(shape, dtype=np.float32)

    def _stack_of(self, model: Model) -> Stack:
        config = model.config
        layers = [cast("DecoderLayer", layer) for layer in model.layers]
        attentions = [layer.attention for layer in layers]
        return Stack(
            input_norm=_stacked([layer.input_norm for layer in layers]),
            qkv=self._table([attention.qkv_proj for attention in attentions]),
            q_norm=_stacked([a.q_norm for a in attentions if a.q_norm is not None]),
            k_norm=_stacked([a.k_norm for a in attentions if a.k_norm is not None]),
            o=self._table([attention.o_proj for attention in attentions]),
            post_attention_norm=_stacked([layer.post_attention_norm for layer in layers]),
            gate_up=self._table([layer.mlp.gate_up_proj for layer in layers]),
            down=self._table([layer.mlp.down_proj for layer in layers]),
            norm=_floats(model.norm.weight),
            head=self._table([cast("Weight", model.lm_head)]),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=np.float32(config.rms_norm_eps),
        )

    def _table(self, weights: Sequence[Weight]) -> NDArray[np.int64]:
        rows = []
        for weight in weights:
            bias = None if weight.bias is None else _floats(weight.bias)
            if bias is not None:
                self._kept.append(bias)
            rows.append(matrix_row(weight.weight, bias, weight.packed))
        return np.array(rows, dtype=np.int64)


def _stacked(norms: Sequence[RMSNorm]) -> NDArray[np.float32]:
    if not norms:
        return np.zeros((0, 0), dtype=np.float32)
    return np.stack([_floats(norm.weight) for norm in norms])


def _pool_of(kv_cache: KVCache) -> Pool:
    def rows(pool: Tensor) -> NDArray[np.float32] | NDArray[np.uint16]:
        flat = pool.view(*pool.shape[:2], -1)
        if flat.dtype == torch.float32:
            return flat.numpy()
        return flat.view(torch.int16).numpy().view(np.uint16)

    k, v = rows(kv_cache.k), rows(kv_cache.v)
    form = DENSE_F32 if kv_cache.k.dtype == torch.float32 else DENSE_BF16
    return Pool(k, v, k.ctypes.data, v.ctypes.data, form)


def _seen_rows(span: SequenceSpan) -> list[Tensor]:
    """Per new token the slots it attends to; causal ones share the span's own."""
    kv_slots, length = span.kv_slots.contiguous(), span.length
    num_rows = kv_slots.shape[0]
    if span.tail_mask is None:
        return [kv_slots[: num_rows - length + q + 1] for q in range(length)]
    start = num_rows - span.tail_mask.shape[1]
    head, tail = kv_slots[:start], kv_slots[start:]
    return [torch.cat((head, tail[mask])) for mask in span.tail_mask]


def narrow_forward(model: Model, kv_cache: KVCache) -> NarrowForward | None:
    """The compiled layers of a model, with the threads that torch was given.

    Returns:
        None if they do not compute what the model's modules do, or not on its device.
    """
    config, dtype = model.config, kv_cache.k.dtype
    sizes = (
        config.hidden_size,
        config.intermediate_size,
        config.head_dim,
        config.num_heads * config.head_dim,
    )
    if type(model.lm_head) is not Weight or any(
        type(layer) is not DecoderLayer for layer in model.layers
    ):
        return None
    is_packed = model.lm_head.packed is not None
    max_tokens = _MAX_TOKENS.get((dtype, is_packed))
    if (
        max_tokens is None
        or model.device.type != "cpu"
        or any(size % LANES for size in sizes)
        or not model.attention_class.is_standard
    ):
        return None
    return NarrowForward(model, kv_cache, max_tokens, torch.get_num_threads())
