"""KV rows of all sequences of one replica, addressed by slot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kv_store.errors import LayoutMismatchError
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from deployments.engine.torch_engine.model_config import ModelConfig


class KVCache:
    """Keys (after rotation) and values of every layer; slot = page * PAGE_TOKENS + offset.

    It knows nothing of who owns which page. All methods belong to the engine thread.

    Attributes:
        k: [num_layers, num_slots, num_kv_heads, head_dim].
        v: same shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> None:
        """Allocate the pool, all zero: attention multiplies masked rows by 0, and 0 * NaN is NaN.

        Args:
            config: the model whose rows are kept.
            num_pages: pages of PAGE_TOKENS rows.
            dtype: of the rows; the model's own.
            device: where the rows live.
        """
        shape = (
            config.num_layers,
            num_pages * PAGE_TOKENS,
            config.num_kv_heads,
            config.head_dim,
        )
        self.num_pages = num_pages
        both = torch.zeros((2, *shape), dtype=dtype, device=device)
        self.k, self.v = both[0], both[1]
        self._page_rows: NDArray[np.uint8] | None = None
        if both.device.type == "cpu":
            pages = both.view(2, config.num_layers, num_pages, -1).view(torch.uint8)
            self._page_rows = pages.permute(2, 1, 0, 3).numpy()
        # A GPU copies to and from pinned memory at the full speed of its bus.
        self._pinned: Tensor | None = None
        if self.k.is_cuda:
            self._pinned = torch.empty(self.page_nbytes, dtype=torch.uint8, pin_memory=True)

    @property
    def num_slots(self) -> int:
        """Rows that can be kept."""
        return self.k.shape[1]

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page, keys and values of all layers."""
        layers, _, heads, dim = self.k.shape
        return layers * 2 * PAGE_TOKENS * heads * dim * self.k.element_size()

    def read_page(self, page: int) -> NDArray[np.uint8]:
        """A copy of one page in the byte order of ``kv_store.layout.PageLayout``.

        Returns:
            [page_nbytes] uint8, owned by the caller.
        """
        rows = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
        both = torch.stack((self.k[:, rows], self.v[:, rows]), dim=1)
        flat = both.view(torch.uint8).flatten()
        if self._pinned is not None:
            flat = self._pinned.copy_(flat).clone()
        raw: NDArray[np.uint8] = flat.numpy()
        return raw

    def page_rows(self, page: int) -> NDArray[np.uint8] | None:
        """One page's memory, for whoever has it lent.

        Returns:
            [num_layers, 2, bytes of one layer's keys or values] uint8; None if only ``write_page``
            reaches it.
        """
        return None if self._page_rows is None else self._page_rows[page]

    def write_page(self, page: int, raw: NDArray[np.uint8]) -> None:
        """Fill one page from the bytes ``read_page`` gave.

        Raises:
            LayoutMismatchError: ``raw`` is not one page of this cache.
        """
        if raw.nbytes != self.page_nbytes:
            raise LayoutMismatchError(f"a page has {self.page_nbytes} bytes, got {raw.nbytes}")
        layers, _, heads, dim = self.k.shape
        rows = slice(page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)
        # By torch, which copies with all threads of the engine; it wraps nothing that is read-only.
        flat = torch.from_numpy(raw if raw.flags.writeable else raw.copy()).flatten()
        flat = flat.view(torch.uint8)
        if self._pinned is not None:
            flat = self._pinned.copy_(flat).to(self.k.device)
        both = flat.view(self.k.dtype).view(layers, 2, PAGE_TOKENS, heads, dim)
        self.k[:, rows] = both[:, 0]
        self.v[:, rows] = both[:, 1]

    def copy_rows(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copy rows of all layers; every source is read before any destination is written.

        Args:
            src_slots: [R] int64.
            dst_slots: [R] int64, distinct.
        """
        for rows in (self.k, self.v):
            rows.index_copy_(1, dst_slots.to(rows.device), rows[:, src_slots.to(rows.device)])
