"""Pages of SGLang's host memory, seen in the order in which the KV tier keeps them.

Whatever the layout of the pool, a page is shown as [num_layers, 2 (K then V), page_tokens,
num_kv_heads, head_dim], a view of SGLang's own memory: one copy takes a page out or puts it in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from kv_store.errors import LayoutMismatchError
from kv_store.layout import PageLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_DTYPES: dict[torch.dtype, Literal["float32", "float16", "bfloat16"]] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_FROM_NATIVE = {
    "layer_first": (1, 0, 2, 3, 4),
    "page_first_direct": (1, 0, 2, 3, 4),
    "page_first": (2, 0, 1, 3, 4),
}
"""Where a page's axes come from: K and V, layers, tokens in the first two, tokens before layers in
the last."""


class HostPool(Protocol):
    """What is read of SGLang's host pool of keys and values.

    Attributes:
        kv_buffer: all pages; K first.
        layout: which axes ``kv_buffer`` has.
        page_size: tokens of a page.
        head_num: KV heads of this rank.
        v_head_dim: of values, where they are as wide as keys.
    """

    kv_buffer: Tensor
    layout: str
    page_size: int
    layer_num: int
    head_num: int
    head_dim: int
    v_head_dim: int
    dtype: torch.dtype


def host_page_layout(pool: HostPool, **identity: Any) -> PageLayout:  # noqa: ANN401 - see PageLayout
    """The layout of a pool's pages.

    Args:
        pool: SGLang's.
        identity: the fields of ``PageLayout`` that the pool does not know.

    Raises:
        LayoutMismatchError: the pool holds something else than keys and values of all heads.
    """
    fields = ("kv_buffer", "layout", "head_num", "head_dim", "v_head_dim", "layer_num")
    missing = [name for name in fields if not hasattr(pool, name)]
    if missing or pool.layout not in _FROM_NATIVE or pool.head_dim != pool.v_head_dim:
        what = f"no {missing[0]}" if missing else f"layout {pool.layout!r}"
        raise LayoutMismatchError(
            f"SGLang's {type(pool).__name__} ({what}) cannot be shared: only keys and values of "
            f"the same width, in one of {', '.join(_FROM_NATIVE)}"
        )
    if pool.dtype not in _DTYPES:
        raise LayoutMismatchError(f"pages of {pool.dtype} cannot be shared: set kv: null")
    return PageLayout(
        num_layers=pool.layer_num,
        num_kv_heads=pool.head_num,
        head_dim=pool.head_dim,
        dtype=_DTYPES[pool.dtype],
        page_tokens=pool.page_size,
        **identity,
    )


class HostPages:
    """Views of one pool's pages. Stateless, so it may be used by several threads."""

    def __init__(self, pool: HostPool) -> None:
        """Look at a pool; ``host_page_layout`` has accepted it."""
        self._pool = pool
        self._axes = _FROM_NATIVE[pool.layout]

    def at(self, host_indices: Tensor, num_pages: int) -> list[Tensor]:
        """The pages at token indices, in order.

        Args:
            host_indices: [num_pages * page_size] int64; each page's tokens are consecutive.
            num_pages: that the caller expects.

        Raises:
            ValueError: it is another number, or a page begins within one.
        """
        size = self._pool.page_size
        if len(host_indices) != num_pages * size:
            raise ValueError(f"{len(host_indices)} indices for {num_pages} pages of {size} tokens")
        starts: Sequence[int] = host_indices[::size].tolist()
        if any(start % size for start in starts):
            raise ValueError("a page does not begin at a multiple of its size")
        return [self._native(start).permute(self._axes) for start in starts]

    def blank(self) -> tuple[Tensor, Tensor]:
        """Memory for one page outside of the pool: flat as SGLang has it, and the view of it."""
        native = torch.empty_like(self._native(0), memory_format=torch.contiguous_format)
        return native.flatten(), native.permute(self._axes)

    def wrap(self, flat: Tensor) -> Tensor:
        """The view of a page that SGLang handed over flat."""
        return flat.reshape(self._native(0).shape).permute(self._axes)

    def _native(self, start: int) -> Tensor:
        buffer, size = self._pool.kv_buffer, self._pool.page_size
        match self._pool.layout:
            case "page_first_direct":
                return buffer[:, start // size]
            case "page_first":
                return buffer[:, start : start + size]
            case _:
                return buffer[:, :, start : start + size]
