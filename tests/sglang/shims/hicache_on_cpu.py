"""Lets SGLang's hierarchical cache run on a CPU: two copies that it has for GPUs alone.

Loaded by SGLang itself in each of its processes, as a plugin. Memory is not pinned, because CUDA
does that; what is copied where is what SGLang's own kernels copy.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def install() -> None:
    """Put the missing functions where SGLang looks for them."""
    from sglang.srt.mem_cache.pool_host import mha
    from sglang.srt.mem_cache.pool_host.base import HostKVCache

    mha.transfer_kv_all_layer_direct_lf_pf = _to_host
    mha.transfer_kv_per_layer_direct_pf_lf = _to_device
    construct = HostKVCache.__init__

    @wraps(construct)
    def unpinned(self: HostKVCache, **arguments: Any) -> None:
        construct(self, **arguments | {"pin_memory": False})

    HostKVCache.__init__ = unpinned


def _to_host(
    *,
    src_ptrs: list[Tensor],
    dst_ptrs: list[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """From each layer's rows, keys of all layers first, to pages that hold all layers."""
    pages = dst_indices[::page_size] // page_size
    num_layers = len(src_ptrs) // 2
    for number, rows in enumerate(src_ptrs):
        side, layer = divmod(number, num_layers)
        dst_ptrs[side][pages, layer] = rows[src_indices].unflatten(0, (-1, page_size))


def _to_device(
    *,
    src_ptrs: list[Tensor],
    dst_ptrs: list[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    layer_id: int,
    page_size: int,
) -> None:
    """The way back, of one layer."""
    pages = src_indices[::page_size] // page_size
    for host, rows in zip(src_ptrs, dst_ptrs, strict=True):
        rows[dst_indices] = host[pages, layer_id].flatten(0, 1)
