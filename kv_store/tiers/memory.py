"""Host memory of this process: the reference tier, and a cache before a slower one."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from kv_store.errors import TierUnavailableError
from kv_store.tiers.base import Blob, KVTier, TierUsage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_store.keys import PageKey


class MemoryTier(KVTier):
    """Least recently used blobs leave first when the byte budget is full."""

    def __init__(self, budget_bytes: int, name: str = "memory") -> None:
        self.name = name
        self._budget_bytes = budget_bytes
        self._blobs: OrderedDict[PageKey, bytes] = OrderedDict()
        self._num_bytes = 0
        self._is_closed = False

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``; does not count as use."""
        self._check_open()
        return [key in self._blobs for key in keys]

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``; counts as use."""
        self._check_open()
        found: list[Blob | None] = []
        for key in keys:
            found.append(self._blobs.get(key))
            if key in self._blobs:
                self._blobs.move_to_end(key)
        return found

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """See ``KVTier``; refuses a blob larger than the whole budget."""
        self._check_open()
        for key, blob in items:
            if key in self._blobs or len(blob) > self._budget_bytes:
                continue
            self._blobs[key] = bytes(blob)
            self._num_bytes += len(blob)
            while self._num_bytes > self._budget_bytes:
                _, evicted = self._blobs.popitem(last=False)
                self._num_bytes -= len(evicted)
        return [key in self._blobs for key, _ in items]

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """See ``KVTier``."""
        self._check_open()
        removed = [blob for key in keys if (blob := self._blobs.pop(key, None)) is not None]
        self._num_bytes -= sum(map(len, removed))
        return len(removed)

    async def delete_namespace(self, namespace_id: bytes) -> int:
        """See ``KVTier``."""
        return await self.delete_many([k for k in self._blobs if k.namespace_id == namespace_id])

    async def aclose(self) -> None:
        """Drop everything."""
        self._is_closed = True
        self._blobs.clear()
        self._num_bytes = 0

    def usage(self) -> TierUsage:
        """Blobs held, and their bytes."""
        return TierUsage(len(self._blobs), self._num_bytes)

    def _check_open(self) -> None:
        if self._is_closed:
            raise TierUnavailableError(f"tier {self.name} is closed")
