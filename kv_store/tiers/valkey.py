"""The hot tier: any server that speaks RESP (Valkey, Redis), shared by all replicas.

One page is one string, so that data and metadata can never be evicted apart; only pages beyond
2 MiB are a few (``parts``). Each key carries its own hash tag, so that a cluster spreads one
prompt's pages over all shards. A page's time to live is longer the nearer it is to the head of its
chain, and starts anew at every read: losing a head makes all pages behind it useless.

Blocking IO in threads of its own, one connection each; page bytes are never copied in Python.
"""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import TYPE_CHECKING

from kv_store.errors import TierUnavailableError
from kv_store.tiers.base import Blob, KVTier
from kv_store.tiers.valkey_admin import admin_clients, drop_namespace
from kv_store.tiers.valkey_batches import ValkeyBatches, default_breaker, page_name
from kv_store.tiers.valkey_exchange import Exchange, PageRead, PageWrite
from kv_store.tiers.valkey_quota import NewPage, TenantQuota

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store.keys import PageKey
    from kv_store.tiers.breaker import CircuitBreaker
    from kv_store.tiers.valkey_topology import ValkeyAddress

_ADMIN_TIMEOUT_S = 5.0


class ValkeyTier(KVTier):
    """Batches, divided among the servers. Connects on first use; none left is an error.

    Of a cluster, the pages of a shard that does not answer are misses, and cost no time once its
    breaker is open.
    """

    def __init__(
        self,
        address: ValkeyAddress,
        *,
        ttl_s: float,
        ttl_head_boost: float,
        connect_timeout_s: float,
        operation_timeout_s: float,
        max_connections: int,
        tenant_quota_bytes: int | None = None,
        find_cuts: Callable[[Blob], Sequence[int]] = lambda _: (),
        make_breaker: Callable[[], CircuitBreaker] = default_breaker,
        name: str = "valkey",
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            address: where the server or servers are.
            ttl_s: life of a page far from its chain's head, after its last read.
            ttl_head_boost: the first page lives ``1 + ttl_head_boost`` times as long.
            connect_timeout_s: limit of one connection attempt.
            operation_timeout_s: limit of one operation, its wait for a connection included.
            max_connections: connections of this process to each server; more operations queue.
            tenant_quota_bytes: beyond it, a namespace's new pages are refused; None for no bound.
            find_cuts: offsets where a blob is best cut if it has to be.
            make_breaker: called for each server of a cluster.
            name: see ``KVTier``.

        Raises:
            ValueError: not an address of these kinds.
        """
        self.name = name
        self.is_shared = True
        self._owner = secrets.token_hex(8).encode()
        self._ttl_s = ttl_s
        self._ttl_head_boost = ttl_head_boost
        self._find_cuts = find_cuts
        self._batches = ValkeyBatches(
            address,
            connect_timeout_s=connect_timeout_s,
            operation_timeout_s=operation_timeout_s,
            max_connections=max_connections,
            make_breaker=make_breaker,
        )
        self._address = address
        self._is_closed = False
        self._quota: TenantQuota | None = None
        if tenant_quota_bytes is not None:
            self._quota = TenantQuota(self._batches, limit_bytes=tenant_quota_bytes, ttl_s=ttl_s)

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``."""
        names = [page_name(key) for key in keys]
        return await self._batches.run(Exchange.contains, names, names, miss=False, is_shared=False)

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``; starts each page's time to live anew."""
        reads = [PageRead(page_name(key), self._ttl_ms(key)) for key in keys]
        return await self._batches.run(
            Exchange.get, reads, [read.name for read in reads], miss=None
        )

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """See ``KVTier``. A page that exists is left alone, and is held."""
        admitted = [True] * len(items)
        if self._quota is not None:
            admitted = await self._quota.admit([NewPage(key, len(blob)) for key, blob in items])
        writes = [
            PageWrite(page_name(key), blob, self._ttl_ms(key))
            for (key, blob), is_admitted in zip(items, admitted, strict=True)
            if is_admitted
        ]
        put = partial(Exchange.put, find_cuts=self._find_cuts)
        names = [write.name for write in writes]
        held = iter(await self._batches.run(put, writes, names, miss=False))
        return [is_admitted and next(held) for is_admitted in admitted]

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """See ``KVTier``; parts that the server let outlive their page stay until they end."""
        names = [page_name(key) for key in keys]
        existed = await self._batches.run(
            Exchange.delete, names, names, miss=False, is_shared=False
        )
        return existed.count(True)

    async def delete_namespace(self, namespace_id: bytes) -> int:
        """See ``KVTier``; asks the servers for all their names, so it takes its time."""
        if self._is_closed:
            raise TierUnavailableError(f"tier {self.name} is closed")
        return await asyncio.to_thread(self._delete_namespace, namespace_id)

    async def claim_many(self, keys: Sequence[PageKey], duration_s: float) -> list[bool]:
        """See ``KVTier``."""
        names = [page_name(key) for key in keys]
        claim = partial(Exchange.claim, owner=self._owner, duration_ms=int(1000 * duration_s) or 1)
        return await self._batches.run(claim, names, names, miss=True, is_shared=False)

    def life_s(self, key: PageKey) -> float:
        """See ``KVTier``; longer at the head of a chain."""
        return self._ttl_s * (1 + self._ttl_head_boost / (1 + key.index))

    async def aclose(self) -> None:
        """Close the connections; operations under way fail."""
        self._is_closed = True
        self._batches.close()

    def _delete_namespace(self, namespace_id: bytes) -> int:
        with admin_clients(self._address, _ADMIN_TIMEOUT_S) as clients:
            return sum(drop_namespace(client, namespace_id) for client in clients)

    def _ttl_ms(self, key: PageKey) -> int:
        return int(1000 * self.life_s(key))
