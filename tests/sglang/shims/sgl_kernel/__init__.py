"""Stands in for SGLang's kernels, which are published for CUDA alone.

On a CPU plain generation calls none of them, they only have to be importable; verifying drafts
calls the two that are here, and SGLang's own speculation those of ``speculative``. The op
``torch.ops.sgl_kernel.convert_weight_packed`` must stay undefined: SGLang takes it for a sign that
its kernels for AMX are there.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from sgl_kernel.speculative import (
    assign_extend_cache_locs_cpu as assign_extend_cache_locs_cpu,
)
from sgl_kernel.speculative import (
    fill_accept_out_cache_loc_cpu as fill_accept_out_cache_loc_cpu,
)
from sgl_kernel.speculative import verify_tree_greedy_cpu as verify_tree_greedy_cpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def copy_all_layer_kv_cache_cpu(
    data_ptrs: Tensor, strides: Tensor, tgt_loc: Tensor, src_loc: Tensor
) -> None:
    """Copy rows of every buffer, all read before one is written.

    Args:
        data_ptrs: addresses of the buffers.
        strides: bytes of a row of each.
        tgt_loc: rows to write.
        src_loc: rows to read, as many.
    """
    is_moved = tgt_loc != src_loc
    tgt_loc, src_loc = tgt_loc[is_moved], src_loc[is_moved]
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(address + row * stride, stride) for row in src_loc.tolist()]
        for row, content in zip(tgt_loc.tolist(), rows, strict=True):
            ctypes.memmove(address + row * stride, content, stride)


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """Enter new slots, which stand one sequence behind the other, behind each sequence's own."""
    del pool_len
    taken = 0
    bounds = zip(start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, (start, end) in zip(req_pool_indices.tolist(), bounds, strict=True):
        slots = out_cache_loc[taken : taken + end - start]
        req_to_token[row, start:end] = slots.to(req_to_token.dtype)
        taken += end - start


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU build")

    return missing
