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
import time
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kv_store.errors import TierUnavailableError
from kv_store.tiers.base import Blob, KVTier
from kv_store.tiers.breaker import CircuitBreaker
from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.valkey_admin import admin_clients, drop_namespace
from kv_store.tiers.valkey_exchange import Exchange, PageRead, PageWrite, Redirect
from kv_store.tiers.valkey_topology import ValkeyAddress, make_topology

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store.keys import PageKey
    from kv_store.tiers.valkey_server import ValkeyServer

T = TypeVar("T")
U = TypeVar("U")

_MAX_REDIRECTS = 3
_ADMIN_TIMEOUT_S = 5.0
# A shard that hangs must leave time to hand over what the others gave.
_SHARD_SHARE = 0.9


def _default_breaker() -> CircuitBreaker:
    return CircuitBreaker(max_failures=3, open_s=1.0, max_open_s=30.0)


class _Route(NamedTuple):
    """Where a part of a batch goes."""

    server: ValkeyServer
    is_asking: bool = False


class ValkeyTier(KVTier):
    """Pipelined batches, divided among the servers. Connects on first use; none left is an error.

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
        find_cuts: Callable[[Blob], Sequence[int]] = lambda _: (),
        make_breaker: Callable[[], CircuitBreaker] = _default_breaker,
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
        self._operation_timeout_s = operation_timeout_s
        self._find_cuts = find_cuts
        self._topology = make_topology(
            address,
            connect_timeout_s=connect_timeout_s,
            operation_timeout_s=operation_timeout_s,
            num_connections=max_connections,
            buffers=BufferPool(),
            make_breaker=make_breaker,
        )
        self._address = address
        self._is_closed = False

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``."""
        names = [page_name(key) for key in keys]
        return await self._run(Exchange.contains, names, names, miss=False, is_shared=False)

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``; starts each page's time to live anew."""
        reads = [PageRead(page_name(key), self._ttl_ms(key)) for key in keys]
        return await self._run(Exchange.get, reads, [read.name for read in reads], miss=None)

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """See ``KVTier``. A page that exists is left alone, and is held."""
        writes = [PageWrite(page_name(key), blob, self._ttl_ms(key)) for key, blob in items]
        put = partial(Exchange.put, find_cuts=self._find_cuts)
        return await self._run(put, writes, [write.name for write in writes], miss=False)

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """See ``KVTier``; the server frees the memory in its own time."""
        names = [page_name(key) for key in keys]
        existed = await self._run(Exchange.delete, names, names, miss=False, is_shared=False)
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
        return await self._run(claim, names, names, miss=True, is_shared=False)

    def life_s(self, key: PageKey) -> float:
        """See ``KVTier``; longer at the head of a chain."""
        return self._ttl_s * (1 + self._ttl_head_boost / (1 + key.index))

    async def aclose(self) -> None:
        """Close the connections; operations under way fail."""
        self._is_closed = True
        self._topology.close()

    async def _run(
        self,
        operation: Callable[[Exchange, Sequence[T]], Sequence[U | Redirect]],
        items: Sequence[T],
        names: Sequence[bytes],
        *,
        miss: U,
        is_shared: bool = True,
    ) -> list[U]:
        """An operation on many items, on the servers that have them.

        Args:
            operation: on the items of one server.
            items: what to operate on.
            names: their keys.
            miss: the result of an item whose server failed while another did not.
            is_shared: whether one server's items are divided among its connections.
        """
        if self._is_closed:
            raise TierUnavailableError(f"tier {self.name} is closed")
        if not items:
            return []
        deadline = time.monotonic() + self._operation_timeout_s * _SHARD_SHARE
        await self._topology.ready()
        results = [miss] * len(items)
        waiting: dict[_Route, Sequence[int]] = {
            _Route(server): indices for server, indices in self._topology.divide(names).items()
        }
        failures: list[TierUnavailableError] = []
        has_answer = False
        for _ in range(1 + _MAX_REDIRECTS):
            shares = [
                (route, share)
                for route, indices in waiting.items()
                for share in _divided(indices, route.server.num_connections if is_shared else 1)
            ]
            outcomes = await asyncio.gather(
                *(
                    _ask(route, operation, [items[index] for index in share], deadline)
                    for route, share in shares
                ),
                return_exceptions=True,
            )
            redirected: dict[_Route, list[int]] = defaultdict(list)
            for (route, share), outcome in zip(shares, outcomes, strict=True):
                if isinstance(outcome, TierUnavailableError):
                    failures.append(outcome)
                    continue
                if isinstance(outcome, BaseException):
                    raise outcome
                for index, result in zip(share, outcome, strict=True):
                    if isinstance(result, Redirect):
                        target = self._topology.follow(result, route.server)
                        redirected[_Route(target, result.is_ask)].append(index)
                    else:
                        results[index] = result
                        has_answer = True
            if not redirected:
                break
            waiting = dict(redirected)
        if failures:
            self._topology.refresh_soon()
            if not has_answer:
                raise failures[0]
        return results

    def _delete_namespace(self, namespace_id: bytes) -> int:
        with admin_clients(self._address, _ADMIN_TIMEOUT_S) as clients:
            return sum(drop_namespace(client, namespace_id) for client in clients)

    def _ttl_ms(self, key: PageKey) -> int:
        return int(1000 * self.life_s(key))


def page_name(key: PageKey) -> bytes:
    """The server's name of a page; ``kv:{<namespace>:*`` is an ACL pattern for one namespace."""
    return b"kv:{%b:%b}" % (key.namespace_id.hex().encode(), key.page_hash.hex().encode())


async def _ask(
    route: _Route,
    operation: Callable[[Exchange, Sequence[T]], Sequence[U | Redirect]],
    items: Sequence[T],
    deadline: float,
) -> Sequence[U | Redirect]:
    return await route.server.run(
        lambda exchange: operation(exchange, items), deadline, is_asking=route.is_asking
    )


def _divided(indices: Sequence[int], num_shares: int) -> list[Sequence[int]]:
    size = max(1, -(-len(indices) // num_shares))
    return [indices[start : start + size] for start in range(0, len(indices), size)]
