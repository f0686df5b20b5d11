"""SGLang's pages in the KV tier: named by its hashes, moved between its host memory and the store.

SGLang names a page by a chain of SHA-256 over its tokens, which begins with the request's
``cache_salt``. The salt is derived from the tenant's key (``requests.cache_salt``), so nobody
without that key can compute the name of a tenant's page; what the chain leaves out, everything
that decides bits, comes in here:

    namespace key = BLAKE3("paceline sglang namespace 1" || layout's fingerprint || fidelity)
    namespace id  = first 16 bytes of BLAKE3(namespace key)
    page hash     = BLAKE3(key=namespace key, SGLang's hash)

Every page has index 0: SGLang does not tell where in its text a page is.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import blake3
import numpy as np
import torch

from kv_store.keys import PageKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from kv_store.config import KVStoreConfig
    from kv_store.layout import PageLayout
    from kv_store.page_store import PageStore

_CONTEXT = b"paceline sglang namespace 1"
_MAX_LOAD_BYTES = 256 << 20
"""Of pages between the store and the host memory at once."""
_FIND_SHARE = 0.3
_LOAD_SHARE = 0.6
"""Of the time that a request waits. SGLang counts it from before the question, and takes nothing of
a batch that is not over by then."""
_SAVE_TIMEOUT_S = 5.0
"""That SGLang's backup thread waits for the pages before, at most."""
_CLEAR_TIMEOUT_S = 30.0
_GRACE_S = 1.0
"""Beyond a deadline that the store itself keeps; only a stalled process takes longer."""


def without_positions(config: KVStoreConfig) -> KVStoreConfig:
    """The settings, without what they say of the pages at the head of a chain.

    All pages look like the first one here; they are treated as those far from the head.
    """
    tiers = tuple(
        tier.model_copy(update={"ttl_head_boost": 0.0}) if hasattr(tier, "ttl_head_boost") else tier
        for tier in config.tiers
    )
    moves = config.moves and config.moves.model_copy(update={"head_pages": 0})
    return config.model_copy(update={"tiers": tiers, "moves": moves})


class SharedPages:
    """Moves pages in batches. Thread-safe; no call takes much longer than its time limit."""

    def __init__(
        self,
        store: PageStore,
        layout: PageLayout,
        *,
        load_timeout_s: float,
        max_queued_pages: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wire up.

        Args:
            store: owned from here on.
            layout: of every page.
            load_timeout_s: that a request waits; most of it is for one batch.
            max_queued_pages: pages that the store's queue has room for.
            clock: seconds, monotonic.
        """
        self._store = store
        self._layout = layout
        self._find_timeout_s = _FIND_SHARE * load_timeout_s
        self._load_timeout_s = _LOAD_SHARE * load_timeout_s
        self._pages_per_load = max(1, _MAX_LOAD_BYTES // layout.nbytes)
        self._pages_per_save = max(1, max_queued_pages)
        self._clock = clock
        context = _CONTEXT + layout.fingerprint + store.fidelity.encode()
        self._key = blake3.blake3(context).digest()
        self.namespace_id: bytes = blake3.blake3(self._key).digest(length=16)

    @property
    def page_bytes(self) -> int:
        """Of one page in SGLang's memory."""
        return self._layout.nbytes

    def key(self, name: str) -> PageKey:
        """What the tier knows a page by.

        Args:
            name: SGLang's, hex.
        """
        page_hash = blake3.blake3(bytes.fromhex(name), key=self._key).digest()
        return PageKey(self.namespace_id, page_hash, 0)

    def num_held(self, names: Sequence[str]) -> int:
        """How many pages at the head of a chain the tier seems to have."""
        found = self._store.find([*map(self.key, names)], timeout_s=self._find_timeout_s)
        return found.result(self._find_timeout_s + _GRACE_S)

    def load(
        self, names: Sequence[str], pages: Sequence[Tensor], *, traceparent: str | None = None
    ) -> list[bool]:
        """Fill pages from the tier; once this has returned nothing writes to them any more.

        Args:
            names: consecutive pages of one chain.
            pages: where they go, [num_layers, 2, page_tokens, num_kv_heads, head_dim] each.
            traceparent: W3C trace context of the request the pages are for.

        Returns:
            True for each page of the prefix that came and is sound, then False; memory of a page
            that did not come is as it was.
        """
        deadline = self._clock() + self._load_timeout_s
        num_loaded = 0
        for start in range(0, len(names), self._pages_per_load):
            left_s = max(0.0, deadline - self._clock())
            keys = [*map(self.key, names[start : start + self._pages_per_load])]
            loading = self._store.load(keys, timeout_s=left_s, traceparent=traceparent)
            loaded = loading.result(left_s + _GRACE_S)
            for page, raw in zip(pages[start:], loaded.pages, strict=False):
                page.copy_(self._tensor(raw))
            num_loaded += len(loaded.pages)
            if len(loaded.pages) < len(keys):
                break
        return [number < num_loaded for number in range(len(names))]

    def save(self, names: Sequence[str], pages: Sequence[Tensor]) -> list[bool]:
        """Copy pages out and queue them for the tier, waiting for room.

        Args:
            names: of the pages.
            pages: see ``load``; the caller may write to them once this has returned.

        Returns:
            Whether each page was taken.
        """
        deadline = self._clock() + _SAVE_TIMEOUT_S
        taken = [False] * len(names)
        for batch in _batches(len(names), self._pages_per_save):
            if not self._store.wait_until_written(max(0.0, deadline - self._clock())):
                break
            for number in batch:
                raw = np.empty(self._layout.nbytes, dtype=np.uint8)
                self._tensor(raw).copy_(pages[number])
                taken[number] = self._store.save(self.key(names[number]), raw)
        return taken

    def clear(self) -> int:
        """Forget all pages of this layout, those of other replicas and all tenants included."""
        cleared = self._store.clear(self.namespace_id, timeout_s=_CLEAR_TIMEOUT_S)
        return cleared.result(_CLEAR_TIMEOUT_S + _GRACE_S)

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def _tensor(self, raw: NDArray[np.uint8]) -> Tensor:
        """A page's bytes as its values; shares memory."""
        dtype: torch.dtype = getattr(torch, self._layout.dtype)
        return torch.from_numpy(raw).view(dtype).view(self._layout.shape)


def _batches(num_items: int, size: int) -> Iterator[range]:
    for start in range(0, num_items, size):
        yield range(start, min(start + size, num_items))
