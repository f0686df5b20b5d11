"""Lets SGLang's attention for CPUs verify drafts; SGLang itself has that for GPUs alone."""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Called in every process of SGLang's that finds this folder's entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend.forward_extend",
        forward_extend,
        HookType.AROUND,
    )


def forward_extend(
    original: Any,
    backend: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
) -> torch.Tensor:
    """The same as SGLang's, and the draft tokens see what their rows of the mask say."""
    if not forward_batch.forward_mode.is_target_verify():
        return original(backend, q, k, v, layer, forward_batch, save_kv_cache)
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    slots = KVWriteLoc(forward_batch.out_cache_loc, None)
    backend.token_to_kv_pool.set_kv_buffer(layer, slots, k, v)
    width = forward_batch.spec_info.draft_token_num
    masks = forward_batch.spec_info.custom_mask.view(-1, width, width)
    queries = q.view(len(masks), width, layer.tp_q_head_num, layer.qk_head_dim)
    keys = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
    values = backend.token_to_kv_pool.get_value_buffer(layer.layer_id)
    outputs = []
    for index, mask in enumerate(masks):
        length = int(forward_batch.seq_lens[index])
        row = backend.req_to_token_pool.req_to_token[forward_batch.req_pool_indices[index]]
        own = row[: length + width]
        seen = torch.ones(width, length, dtype=torch.bool)
        output = torch.nn.functional.scaled_dot_product_attention(
            queries[index].movedim(0, 1)[None],
            keys[own].movedim(0, 1)[None],
            values[own].movedim(0, 1)[None],
            attn_mask=torch.cat([seen, mask], dim=1),
            enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            scale=layer.scaling,
        )
        outputs.append(output[0].movedim(0, 1))
    return torch.cat(outputs).reshape(q.shape[0], -1)
