"""Joins a model, a KV pool and the compiled layers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.nn import functional as F

from deployments.engine.torch_engine.connected import ConnectedLayer, DraftHead
from deployments.engine.torch_engine.kernels.attention import CHUNK, PARTIAL_EXTRA, SCORES
from deployments.engine.torch_engine.kernels.memory import ITEMS, LINE
from deployments.engine.torch_engine.kernels.packing import matrix_row
from deployments.engine.torch_engine.kernels.step import (
    PHASES,
    Pool,
    Scratch,
    Stack,
    Tokens,
    run_layers,
)
from deployments.engine.torch_engine.kernels.unpacking import unpack_rows
from deployments.engine.torch_engine.kernels.vectors import (
    BLOCK,
    DENSE_BF16,
    DENSE_F32,
    HAS_AVX512,
    LANES,
)
from deployments.engine.torch_engine.models.llama import DecoderLayer, Weight
from deployments.engine.torch_engine.precision import multiplies_bfloat16
from deployments.engine.torch_engine.rotary import RotationRows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
    from deployments.engine.torch_engine.kv_cache import KVCache
    from deployments.engine.torch_engine.models.llama import Model, RMSNorm

_CHUNKS_STEP = 16
_MAX_TOKENS = {
    (torch.float32, False): 16,
    (torch.float32, True): 32,
    (torch.bfloat16, False): 16 if HAS_AVX512 else 32,
    (torch.bfloat16, True): 32 if HAS_AVX512 else 16,
}
"""By dtype and whether the weights are packed: beyond, the matrix units win (measured)."""
_MAX_TOKENS_WIDENED = 32
"""The same where a wide forward must first widen all weights."""

TILE_TOKENS = 64
"""Tokens that read the weights together where all widths are computed here."""


def _padded(rows: int) -> int:
    return -(-rows // LANES) * LANES


def _floats(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().to(torch.float32).contiguous().numpy()
    return array


class NarrowForward:
    """Forwards of few tokens, or of many as tiles of few. Belongs to the engine thread.

    A row's logits and KV rows have the same bits whatever else is computed, in whatever tiles and
    on however many threads: sums have an order of their own, and all rows are read from the pool.

    Attributes:
        max_tokens: tokens of one tile.
    """

    def __init__(self, model: Model, kv_cache: KVCache, max_tokens: int, num_threads: int) -> None:
        config = model.config
        self.max_tokens = max_tokens
        self._model = model
        self._kv_cache = kv_cache
        self._num_threads = num_threads
        self._rotations = RotationRows(model.get_buffer("rope_frequencies"), config.rope.amplitude)
        self._others = ThreadPoolExecutor(num_threads - 1, "narrow") if num_threads > 1 else None
        num_lines = ITEMS // LINE + PHASES * config.num_layers + 1
        self._counter = np.zeros(num_lines * LINE // 8, dtype=np.int64)
        self._kept: list[NDArray[np.float32]] = []
        self._connectors = {
            index: layer.connector
            for index, layer in enumerate(model.layers)
            if isinstance(layer, ConnectedLayer)
        }
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
            normed=rows(config.hidden_size),
            rounded=np.zeros(max_tokens * widest, dtype=np.int16),
            sums=np.zeros(2 * max_tokens * (widest // BLOCK + 1), dtype=np.float32),
            qkv=rows(_padded(qkv_rows)),
            scores=np.zeros((num_threads, SCORES), dtype=np.float32),
            attended=rows(config.num_heads * config.head_dim),
            projected=rows(_padded(config.hidden_size)),
            gate_up=rows(_padded(2 * config.intermediate_size)),
            hidden=rows(config.intermediate_size),
            **self._room_for(_CHUNKS_STEP),
            logits=rows(_padded(_head_of(model).weight.shape[0])),
        )

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As ``ModelRunner.forward``; the result is the caller's. No row may see a later one."""
        return self.forward_with_features(batch, ())[0]

    def forward_with_features(
        self, batch: ForwardBatch, capture_layers: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """As ``ModelRunner.forward_with_features``; features have the model's dtype."""
        seen = [rows for span in batch.spans for rows in _seen_rows(span)]
        self._make_room(max(rows.shape[0] for rows in seen))
        wanted = batch.logit_rows
        config = self._model.config
        scores = torch.empty(wanted.shape[0], int(self._stack.head[0, 2]))
        num_tokens, last = batch.token_ids.shape[0], config.num_layers
        features = {
            layer: torch.empty(num_tokens, config.hidden_size, dtype=self._model.dtype)
            for layer in capture_layers
        }
        cuts = sorted({at for at in (*capture_layers, *self._connectors) if 0 < at < last})
        for start in range(0, num_tokens, self.max_tokens):
            end = min(start + self.max_tokens, num_tokens)
            is_here = (wanted >= start) & (wanted < end)
            self._embed(batch.token_ids[start:end])
            tokens = Tokens(
                slots=batch.slots[start:end].contiguous().numpy(),
                seen=np.array([rows.data_ptr() for rows in seen[start:end]], dtype=np.int64),
                num_seen=np.array([rows.shape[0] for rows in seen[start:end]], dtype=np.int64),
                cos_sin=self._rotations.of(batch.positions[start:end]).numpy(),
                logit_rows=(wanted[is_here] - start).numpy(),
            )
            stream = torch.from_numpy(self._scratch.x)[: end - start]
            for first, behind in pairwise((0, *cuts, last)):
                if first in features:
                    features[first][start:end] = stream
                if first in self._connectors:
                    stream.copy_(self._connectors[first](stream))
                self._run(tokens, first, behind)
            if last in features:
                features[last][start:end] = stream
            if -1 in features:  # what the head sees
                weight = self._model.norm.weight.float()
                features[-1][start:end] = F.rms_norm(
                    stream, weight.shape, weight, config.rms_norm_eps
                )
            found = torch.from_numpy(self._scratch.logits)
            scores[is_here] = found[: int(is_here.sum()), : scores.shape[1]]
        head = self._model.lm_head
        logits = head.spread(scores) if isinstance(head, DraftHead) else scores
        return logits, tuple(features[layer] for layer in capture_layers)

    def _make_room(self, longest: int) -> None:
        num_chunks = -(-longest // CHUNK)
        if num_chunks > self._scratch.partial.shape[1]:
            num_chunks = -(-num_chunks // _CHUNKS_STEP) * _CHUNKS_STEP
            self._scratch = self._scratch._replace(**self._room_for(num_chunks))

    def _embed(self, token_ids: Tensor) -> None:
        table = self._model.embed_tokens
        if table.packed is not None:
            unpack_rows(table.packed, token_ids.numpy(), self._scratch.x)
        else:
            embedded = F.embedding(token_ids, table.weight)
            torch.from_numpy(self._scratch.x)[: token_ids.shape[0]] = embedded

    def _run(self, tokens: Tokens, first: int, behind: int) -> None:
        """Layers ``first`` to ``behind``; the head only behind the last one."""
        stack, pool = self._stack, self._pool
        if behind < self._model.config.num_layers:
            tokens = tokens._replace(logit_rows=tokens.logit_rows[:0])
        if (first, behind) != (0, self._model.config.num_layers):
            stack, pool = _stack_part(stack, first, behind), _pool_part(pool, first, behind)
        self._counter[:] = 0
        shared = (stack, pool, tokens, self._scratch, self._counter.ctypes.data)
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

    def _room_for(self, num_chunks: int) -> dict[str, Any]:
        config = self._model.config
        size = config.head_dim + PARTIAL_EXTRA
        return {
            "partial": np.zeros(
                (self.max_tokens, num_chunks, config.num_heads, size), dtype=np.float32
            ),
            "places": np.arange(num_chunks),
            "shares": np.zeros((self._num_threads, num_chunks), dtype=np.float32),
        }

    def _stack_of(self, model: Model) -> Stack:
        config = model.config
        layers = [cast("DecoderLayer", _decoder_layer(layer)) for layer in model.layers]
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
            head=self._table([_head_of(model)]),
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


def _decoder_layer(layer: nn.Module) -> nn.Module:
    return layer.layer if isinstance(layer, ConnectedLayer) else layer


def _head_of(model: Model) -> Weight:
    head = model.lm_head
    return head.rows if isinstance(head, DraftHead) else cast("Weight", head)


def _stacked(norms: Sequence[RMSNorm]) -> NDArray[np.float32]:
    if not norms:
        return np.zeros((0, 0), dtype=np.float32)
    return np.stack([_floats(norm.weight) for norm in norms])


def _stack_part(stack: Stack, first: int, behind: int) -> Stack:
    by_layer = ("input_norm", "qkv", "q_norm", "k_norm", "o", "post_attention_norm", "gate_up")
    parts = {name: getattr(stack, name)[first:behind] for name in (*by_layer, "down")}
    return stack._replace(**parts)


def _pool_part(pool: Pool, first: int, behind: int) -> Pool:
    k, v = pool.k[first:behind], pool.v[first:behind]
    return pool._replace(k=k, v=v, k_at=k.ctypes.data, v_at=v.ctypes.data)


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


def obstacle(model: Model, kv_cache: KVCache) -> str | None:
    """Why these layers cannot compute what a model's modules do; None if they can."""
    config = model.config
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
    }
    odd = [f"{name} {size}" for name, size in sizes.items() if size % LANES]
    is_own = type(_head_of(model)) is not Weight or any(
        type(_decoder_layer(layer)) is not DecoderLayer for layer in model.layers
    )
    if model.device.type != "cpu":
        return f"the kernels run on the CPU, not on {model.device.type}"
    if kv_cache.k.dtype not in {torch.float32, torch.bfloat16}:
        return f"the kernels do not read {kv_cache.k.dtype}"
    if is_own or not model.attention_class.is_standard:
        return f"the kernels do not know the layers of {config.model_type}"
    if odd:
        return f"the kernels need sizes that {LANES} divides, not {', '.join(odd)}"
    return None


def max_narrow_tokens(model: Model) -> int | None:
    """Tokens up to which a forward is faster here than in the model's modules; None for all."""
    head = _head_of(model)
    if head.packed is not None and not multiplies_bfloat16():
        return None
    if model.compute_dtype != model.dtype:
        return _MAX_TOKENS_WIDENED
    return _MAX_TOKENS[model.dtype, head.packed is not None]
