"""Page keys: a keyed BLAKE3 chain under a tenant's secret and the layout's fingerprint.

    namespace key = BLAKE3(key=tenant_key, "paceline kv namespace 1" || fingerprint || fidelity)
    namespace id  = first 16 bytes of BLAKE3(namespace key)
    page hash i   = BLAKE3(key=namespace key, page hash i-1 || token ids of page i as u32 LE)

Without the tenant's secret nobody can compute, guess or test for another tenant's keys, and
anything that changes KV bits (or how exact they are) leads to other keys, hence to a miss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import blake3
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_store.layout import PageLayout

EXACT = "exact"
"""Fidelity of pages stored raw or lossless, on exact ancestors only."""


class PageKey(NamedTuple):
    """Names one page for ever: a page is immutable once hashed.

    Attributes:
        namespace_id: 16 bytes; safe to show.
        page_hash: 32 bytes; covers every token up to the page's end.
        index: the page's place in its chain, 0 for the first.
    """

    namespace_id: bytes
    page_hash: bytes
    index: int  # type: ignore[assignment]  # shadows tuple.index, which nobody calls on a key


class Namespace:
    """All pages of one (tenant, layout, fidelity)."""

    def __init__(self, tenant_key: bytes, layout: PageLayout, fidelity: str) -> None:
        """Derive the namespace.

        Args:
            tenant_key: 32 secret bytes.
            layout: the pages' layout.
            fidelity: ``EXACT`` or ``lossy:<gate>``.
        """
        if len(tenant_key) != 32:
            raise ValueError("a tenant key has 32 bytes")
        context = b"paceline kv namespace 1" + layout.fingerprint + fidelity.encode()
        self._key = blake3.blake3(context, key=tenant_key).digest()
        self.namespace_id: bytes = blake3.blake3(self._key).digest(length=16)
        self._page_tokens = layout.page_tokens

    def extend(self, parent: PageKey | None, token_ids: Sequence[int]) -> PageKey:
        """The key of the page that holds ``token_ids`` behind ``parent``.

        Raises:
            ValueError: ``token_ids`` is not exactly one page.
        """
        if len(token_ids) != self._page_tokens:
            raise ValueError(f"a page has {self._page_tokens} tokens, got {len(token_ids)}")
        tokens = np.asarray(token_ids, dtype="<u4").tobytes()
        ancestor = parent.page_hash if parent else bytes(32)
        page_hash = blake3.blake3(ancestor + tokens, key=self._key).digest()
        return PageKey(self.namespace_id, page_hash, parent.index + 1 if parent else 0)

    def chain(self, token_ids: Sequence[int]) -> list[PageKey]:
        """Keys of all full pages of a sequence, in order."""
        keys: list[PageKey] = []
        size = self._page_tokens
        for start in range(0, len(token_ids) - size + 1, size):
            keys.append(self.extend(keys[-1] if keys else None, token_ids[start : start + size]))
        return keys
