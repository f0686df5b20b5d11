"""The hot tier: any server that speaks RESP (Valkey, Redis), shared by all replicas.

One page is one string, so that data and metadata can never be evicted apart. Each key carries its
own hash tag, so that a cluster spreads one prompt's pages over all shards. A page's time to live is
longer the nearer it is to the head of its chain, and starts anew at every read: losing a head makes
all pages behind it useless.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from kv_store.errors import TierUnavailableError
from kv_store.tiers.base import Blob, KVTier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from redis.asyncio.client import Pipeline

    from kv_store.keys import PageKey

_READ_BYTES = 1 << 20


class ValkeyTier(KVTier):
    """Pipelined, non-transactional batches. Connects on first use; a dead server is an error."""

    def __init__(
        self,
        url: str,
        *,
        ttl_s: float,
        ttl_head_boost: float,
        connect_timeout_s: float,
        operation_timeout_s: float,
        max_connections: int,
        name: str = "valkey",
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``, with credentials if need be.
            ttl_s: life of a page far from its chain's head, after its last read.
            ttl_head_boost: the first page lives ``1 + ttl_head_boost`` times as long.
            connect_timeout_s: limit of one connection attempt.
            operation_timeout_s: limit of one wait for the server.
            max_connections: connections of this process, at most; more operations queue.
            name: see ``KVTier``.

        Raises:
            ValueError: not a URL of these kinds.
        """
        self.name = name
        self._ttl_s = ttl_s
        self._ttl_head_boost = ttl_head_boost
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=operation_timeout_s,
            socket_connect_timeout=connect_timeout_s,
            socket_timeout=operation_timeout_s,
            socket_read_size=_READ_BYTES,
            retry=Retry(NoBackoff(), 0),  # the breaker decides when to try again
            protocol=2,
            decode_responses=False,
        )
        self._client = Redis(connection_pool=pool)
        self._pool = pool
        self._is_closed = False

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``."""
        pipeline = self._pipeline()
        for key in keys:
            pipeline.exists(_name(key))
        return [bool(reply) for reply in await self._execute(pipeline)]

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``; starts each page's time to live anew."""
        pipeline = self._pipeline()
        for key in keys:
            pipeline.getex(_name(key), px=self._ttl_ms(key))
        return cast("list[Blob | None]", await self._execute(pipeline))

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """See ``KVTier``. A page that exists is left alone, and is held."""
        pipeline = self._pipeline()
        for key, blob in items:
            pipeline.set(_name(key), blob, nx=True, px=self._ttl_ms(key))
        await self._execute(pipeline)
        return [True] * len(items)

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """See ``KVTier``; the server frees the memory in its own time."""
        pipeline = self._pipeline()
        for key in keys:
            pipeline.unlink(_name(key))
        return sum(cast("list[int]", await self._execute(pipeline)))

    async def aclose(self) -> None:
        """Close the connections."""
        self._is_closed = True
        await self._client.aclose()
        await self._pool.aclose()

    def _pipeline(self) -> Pipeline:
        if self._is_closed:
            raise TierUnavailableError(f"tier {self.name} is closed")
        return self._client.pipeline(transaction=False)

    async def _execute(self, pipeline: Pipeline) -> list[object]:
        """All replies, or ``TierUnavailableError`` if any is an error (out of memory, loading)."""
        try:
            replies = await pipeline.execute(raise_on_error=False)
        except (RedisError, OSError, TimeoutError) as exc:
            raise TierUnavailableError(f"{type(exc).__name__}: {exc}") from exc
        for reply in replies:
            if isinstance(reply, RedisError):
                raise TierUnavailableError(f"{type(reply).__name__}: {reply}") from reply
        return cast("list[object]", replies)

    def _ttl_ms(self, key: PageKey) -> int:
        return int(1000 * self._ttl_s * (1 + self._ttl_head_boost / (1 + key.index)))


def _name(key: PageKey) -> str:
    """The server's name of a page; ``kv:{<namespace>:*`` is an ACL pattern for one namespace."""
    return f"kv:{{{key.namespace_id.hex()}:{key.page_hash.hex()}}}"
