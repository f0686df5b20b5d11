"""The hot tier: any server that speaks RESP (Valkey, Redis), shared by all replicas.

One page is one string, so that data and metadata can never be evicted apart; only pages beyond
2 MiB are a few (``parts``). Each key carries its own hash tag, so that a cluster spreads one
prompt's pages over all shards. A page's time to live is longer the nearer it is to the head of its
chain, and starts anew at every read: losing a head makes all pages behind it useless.

Blocking IO in threads of its own, one connection each; page bytes are never copied in Python.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.retry import Retry

from kv_store.errors import TierUnavailableError
from kv_store.tiers.base import Blob, KVTier
from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.parts import Manifest, is_split, read_manifest, split
from kv_store.tiers.resp import ErrorReply, ReplyReader, command, command_with_payload
from kv_store.tiers.valkey_connection import ValkeyConnection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store.keys import PageKey

MAX_VALUE_BYTES = 2 << 20

T = TypeVar("T")
U = TypeVar("U")
Reply = Blob | int | None


class ValkeyTier(KVTier):
    """Pipelined batches. Connects on first use; a dead server is an error."""

    def __init__(
        self,
        url: str,
        *,
        ttl_s: float,
        ttl_head_boost: float,
        connect_timeout_s: float,
        operation_timeout_s: float,
        max_connections: int,
        find_cuts: Callable[[Blob], Sequence[int]] = lambda _: (),
        name: str = "valkey",
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``, with credentials if need be.
            ttl_s: life of a page far from its chain's head, after its last read.
            ttl_head_boost: the first page lives ``1 + ttl_head_boost`` times as long.
            connect_timeout_s: limit of one connection attempt.
            operation_timeout_s: limit of one operation, its wait for a connection included.
            max_connections: connections of this process; more operations queue.
            find_cuts: offsets where a blob is best cut if it has to be.
            name: see ``KVTier``.

        Raises:
            ValueError: not a URL of these kinds.
        """
        self.name = name
        self._ttl_s = ttl_s
        self._ttl_head_boost = ttl_head_boost
        self._operation_timeout_s = operation_timeout_s
        self._num_connections = max_connections
        self._find_cuts = find_cuts
        factory = ConnectionPool.from_url(
            url,
            socket_connect_timeout=connect_timeout_s,
            socket_timeout=operation_timeout_s,
            retry=Retry(NoBackoff(), 0),  # the breaker decides when to try again
            protocol=2,
        )
        self._connections = [
            ValkeyConnection(factory.make_connection) for _ in range(max_connections)
        ]
        self._idle = deque(self._connections)  # as many as there are threads
        self._threads = ThreadPoolExecutor(max_connections, thread_name_prefix="kv-valkey")
        self._buffers = BufferPool()
        self._is_closed = False

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``."""
        return await self._run(_contains, keys) if keys else []

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``; starts each page's time to live anew."""
        return await self._run_shared(self._get, keys)

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """See ``KVTier``. A page that exists is left alone, and is held."""
        return await self._run_shared(self._put, items)

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """See ``KVTier``; the server frees the memory in its own time."""
        return await self._run(_delete, [_name(key) for key in keys]) if keys else 0

    async def aclose(self) -> None:
        """Close the connections; operations under way fail."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()
        for connection in self._connections:
            connection.abort()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run_shared(
        self, operation: Callable[[_Exchange, Sequence[T]], list[U]], items: Sequence[T]
    ) -> list[U]:
        """An operation on many items, divided among the connections."""
        size = max(1, -(-len(items) // self._num_connections))
        shares = [items[start : start + size] for start in range(0, len(items), size)]
        done = await asyncio.gather(
            *(self._run(operation, share) for share in shares), return_exceptions=True
        )
        results: list[U] = []
        for result in done:
            if isinstance(result, BaseException):
                raise result
            results += result
        return results

    async def _run(self, operation: Callable[[_Exchange, T], U], argument: T) -> U:
        if self._is_closed:
            raise TierUnavailableError(f"tier {self.name} is closed")
        deadline = time.monotonic() + self._operation_timeout_s
        work = partial(self._on_connection, operation, argument, deadline)
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _on_connection(
        self, operation: Callable[[_Exchange, T], U], argument: T, deadline: float
    ) -> U:
        """In a thread."""
        try:
            connection = self._idle.pop()
        except IndexError:
            raise TierUnavailableError(f"tier {self.name} is closed") from None
        try:
            return operation(_Exchange(connection, deadline, self._buffers), argument)
        finally:
            if self._is_closed:
                connection.close()
            self._idle.append(connection)

    def _get(self, exchange: _Exchange, keys: Sequence[PageKey]) -> list[Blob | None]:
        values = exchange.get_all([(_name(key), self._ttl(key)) for key in keys])
        blobs: list[Blob | None] = []
        for key, value in zip(keys, values, strict=True):
            manifest = None if value is None else read_manifest(value)
            if manifest is None:
                blobs.append(value)
            else:
                blobs.append(exchange.get_parts(_name(key), manifest, self._ttl(key)))
        return blobs

    def _put(self, exchange: _Exchange, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        parts: list[Blob] = []
        wholes: list[Blob] = []
        num_parts = 0
        for key, blob in items:
            value = blob
            if is_split(blob, MAX_VALUE_BYTES):
                manifest, pieces = split(blob, self._find_cuts(blob), MAX_VALUE_BYTES)
                value = manifest.pack()
                for name, piece in zip(manifest.part_names(_name(key)), pieces, strict=True):
                    parts += _set(name, piece, self._ttl(key))
                num_parts += len(pieces)
            wholes += _set(_name(key), value, self._ttl(key))
        # Published last: a manifest is found only once its parts are there.
        exchange.send(parts, num_parts)
        exchange.send(wholes, len(items))
        return [True] * len(items)

    def _ttl(self, key: PageKey) -> bytes:
        return b"%d" % int(1000 * self._ttl_s * (1 + self._ttl_head_boost / (1 + key.index)))


class _Exchange:
    """One operation's talk with the server, in one thread, under one deadline."""

    def __init__(self, connection: ValkeyConnection, deadline: float, buffers: BufferPool) -> None:
        self._connection = connection
        self._deadline = deadline
        self._buffers = buffers

    def send(self, request: Sequence[Blob], num_replies: int) -> list[Reply]:
        """Send pipelined commands; each reply is checked once all have been read."""

        def read(reader: ReplyReader) -> list[Reply | ErrorReply]:
            return [reader.read(self._buffers.take) for _ in range(num_replies)]

        if not num_replies:
            return []
        return _checked(self._connection.exchange(request, read, self._deadline))

    def get_all(self, names: Sequence[tuple[bytes, bytes]]) -> list[Blob | None]:
        """The values of (name, time to live) pairs."""
        request = b"".join(command(b"GETEX", name, b"PX", ttl) for name, ttl in names)
        values = self.send([request], len(names))
        return [None if isinstance(value, int) else value for value in values]

    def get_parts(self, name: bytes, manifest: Manifest, ttl: bytes) -> Blob | None:
        """The blob behind a manifest; without any of its parts the manifest goes too."""
        blob = self._buffers.take(manifest.num_bytes)
        start = len(manifest.head)
        blob[:start] = manifest.head
        names = manifest.part_names(name)
        places: list[memoryview] = []
        for length in manifest.lengths:
            places.append(blob[start : start + length])
            start += length

        def read(reader: ReplyReader) -> list[Reply | ErrorReply]:
            return [reader.read(partial(self._place, place)) for place in places]

        request = b"".join(command(b"GETEX", part, b"PX", ttl) for part in names)
        replies = _checked(self._connection.exchange([request], read, self._deadline))
        is_whole = all(reply is place for reply, place in zip(replies, places, strict=True))
        if not is_whole:
            _delete(self, [name])
            return None
        return blob

    def contains(self, names: Sequence[bytes]) -> list[bool]:
        """Whether each name exists."""
        request = b"".join(
            b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b\r\n" % (len(name), name) for name in names
        )

        def read(reader: ReplyReader) -> list[bool] | list[Reply | ErrorReply]:
            flags = reader.read_flags(len(names))
            if flags is not None:
                return flags
            return [reader.read(self._buffers.take) for _ in names]

        replies = self._connection.exchange([request], read, self._deadline)
        return [bool(reply) for reply in _checked(replies)]

    def _place(self, place: memoryview, size: int) -> memoryview:
        return place if size == len(place) else self._buffers.take(size)


def _contains(exchange: _Exchange, keys: Sequence[PageKey]) -> list[bool]:
    return exchange.contains([_name(key) for key in keys])


def _delete(exchange: _Exchange, names: Sequence[bytes]) -> int:
    replies = exchange.send([command(b"UNLINK", name) for name in names], len(names))
    return sum(reply for reply in replies if isinstance(reply, int))


def _set(name: bytes, value: Blob, ttl: bytes) -> list[Blob]:
    return command_with_payload(b"SET", name, payload=value, options=(b"NX", b"PX", ttl))


def _checked(replies: Sequence[Reply | ErrorReply]) -> list[Reply]:
    """The replies, or ``TierUnavailableError`` if any is an error (out of memory, loading)."""
    good: list[Reply] = []
    for reply in replies:
        if isinstance(reply, ErrorReply):
            raise TierUnavailableError(reply.message)
        good.append(reply)
    return good


def _name(key: PageKey) -> bytes:
    """The server's name of a page; ``kv:{<namespace>:*`` is an ACL pattern for one namespace."""
    return b"kv:{%b:%b}" % (key.namespace_id.hex().encode(), key.page_hash.hex().encode())
