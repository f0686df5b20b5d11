"""Which server has a key: a single one, one that Sentinels name, or a shard of a cluster.

Addresses, TLS, credentials, Sentinel and the cluster's slot map are redis-py's job; it opens every
connection, and page bytes then bypass it (``valkey_connection``).
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from redis import ConnectionPool, RedisError, Sentinel
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, NodesManager
from redis.connection import SSLConnection, parse_url
from redis.crc import key_slot
from redis.exceptions import MovedError, RedisClusterException
from redis.retry import Retry
from redis.sentinel import SentinelConnectionPool

from kv_store.errors import TierUnavailableError
from kv_store.tiers.valkey_server import ValkeyServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store.config import ValkeyTierConfig
    from kv_store.tiers.breaker import CircuitBreaker
    from kv_store.tiers.buffers import BufferPool
    from kv_store.tiers.valkey_pipeline import Redirect

logger = logging.getLogger(__name__)

DEFAULT_PORT = 6379
_SENTINEL_PORT = 26379
_REFRESH_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class ValkeyAddress:
    """Where the server or servers are.

    Attributes:
        url: ``redis://``, ``rediss://`` or ``unix://``. Of a cluster, commas may separate several
            nodes' host:port, any of which is asked for the others. With Sentinels, the host is the
            name of the service.
        sentinels: a URL with the Sentinels' host:port, separated by commas, or empty.
        is_cluster: whether the server is a node of a cluster.
    """

    url: str
    sentinels: str = ""
    is_cluster: bool = False

    def __repr__(self) -> str:
        return "ValkeyAddress(...)"  # URLs hold passwords


def valkey_address(config: ValkeyTierConfig) -> ValkeyAddress:
    """The address in a configuration, secrets included."""
    return ValkeyAddress(
        url=config.url.get_secret_value(),
        sentinels=config.sentinels.get_secret_value() if config.sentinels else "",
        is_cluster=config.is_cluster,
    )


class Topology(ABC):
    """Names the server of each key. Lives on one event loop."""

    @abstractmethod
    async def ready(self) -> None:
        """Find out which servers there are, unless that is known.

        Raises:
            TierUnavailableError: nobody can say.
        """

    @abstractmethod
    def divide(self, names: Sequence[bytes]) -> dict[ValkeyServer, Sequence[int]]:
        """Indices of the keys that each server has; those nobody has are left out.

        Only once ready.
        """

    @abstractmethod
    def follow(self, redirect: Redirect, server: ValkeyServer) -> ValkeyServer:
        """The server a redirect leads to, away from ``server``."""

    @abstractmethod
    def refresh_soon(self) -> None:
        """A server failed or redirected: look again, in the background, at who has what."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections. Idempotent."""


def make_topology(
    address: ValkeyAddress,
    *,
    connect_timeout_s: float,
    operation_timeout_s: float,
    num_connections: int,
    buffers: BufferPool,
    make_breaker: Callable[[], CircuitBreaker],
) -> Topology:
    """The topology an address speaks of; nothing is connected yet.

    Args:
        address: see there.
        connect_timeout_s: limit of one connection attempt.
        operation_timeout_s: limit of a handshake's reply.
        num_connections: of each server.
        buffers: where blobs are read to.
        make_breaker: called for each server of a cluster.

    Raises:
        ValueError: not URLs of these kinds.
    """
    if address.is_cluster:
        # A node that hangs must not keep the others from being asked.
        reply_timeout_s = min(connect_timeout_s, operation_timeout_s)
        hosts, settings = split_url(address.url, DEFAULT_PORT)
        return _Cluster(
            hosts,
            connection_settings(connect_timeout_s, reply_timeout_s) | settings,
            lambda pool: ValkeyServer(
                _connection_maker(pool),
                num_connections=num_connections,
                buffers=buffers,
                breaker=make_breaker(),
            ),
        )
    pool = server_pool(address, connection_settings(connect_timeout_s, operation_timeout_s))
    return _OneServer(
        ValkeyServer(_connection_maker(pool), num_connections=num_connections, buffers=buffers)
    )


def connection_settings(connect_timeout_s: float, reply_timeout_s: float) -> dict[str, Any]:
    """redis-py's settings of each connection.

    Args:
        connect_timeout_s: limit of one connection attempt.
        reply_timeout_s: limit of one reply that redis-py waits for.
    """
    return {
        "socket_connect_timeout": connect_timeout_s,
        "socket_timeout": reply_timeout_s,
        "retry": Retry(NoBackoff(), 0),  # breakers, or whoever asks, decide when to try again
        "protocol": 2,
    }


def server_pool(address: ValkeyAddress, settings: dict[str, Any]) -> ConnectionPool:
    """A pool whose connections lead to the single server, or to the primary that Sentinels name.

    Args:
        address: not a cluster's.
        settings: see ``connection_settings``.

    Raises:
        ValueError: not URLs of these kinds.
    """
    if not address.sentinels:
        return ConnectionPool.from_url(address.url, **settings)
    hosts, sentinel_kwargs = split_url(address.sentinels, _SENTINEL_PORT)
    sentinel_kwargs["ssl"] = sentinel_kwargs.pop("connection_class", None) is SSLConnection
    [(service, _)], kwargs = split_url(address.url, DEFAULT_PORT)
    kwargs["ssl"] = kwargs.pop("connection_class", None) is SSLConnection
    sentinel = Sentinel(
        hosts,
        sentinel_kwargs=sentinel_kwargs
        | {name: value for name, value in settings.items() if name != "protocol"},
    )
    return SentinelConnectionPool(service, sentinel, **(settings | kwargs))


def find_nodes(hosts: Sequence[tuple[str, int]], settings: dict[str, Any]) -> NodesManager:
    """A cluster's map, from the first node that answers.

    Args:
        hosts: nodes, any of which is asked for the others.
        settings: see ``connection_settings``; with those of the URL.

    Raises:
        RedisClusterException: nobody can say; so do ``RedisError`` and ``OSError``.
    """
    nodes = [ClusterNode(host, port) for host, port in hosts]
    return NodesManager(nodes, from_url=True, **settings)


def split_url(url: str, default_port: int) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Hosts and ports of a URL whose commas separate them, and redis-py's other settings.

    Raises:
        ValueError: not such a URL.
    """
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    addresses: list[tuple[str, int]] = []
    settings: dict[str, Any] = {}
    for host in hosts.split(","):
        one = urlunsplit(parts._replace(netloc=f"{user}{at}{host}"))
        settings = dict(parse_url(one))
        address = settings.pop("host", "localhost"), int(settings.pop("port", default_port))
        addresses.append(address)
    settings.pop("db", None)  # clusters and Sentinels have one only
    return addresses, settings


def _connection_maker(pool: ConnectionPool) -> Callable[[], object]:
    """Makes what the pool would make, unseen by it.

    A pool counts the connections it has made, up to a limit, and would never hear of those that we
    throw away.
    """
    return lambda: pool.connection_class(**pool.connection_kwargs)


class _OneServer(Topology):
    """Behind Sentinels too: each new connection asks them for the primary."""

    def __init__(self, server: ValkeyServer) -> None:
        self._server = server

    async def ready(self) -> None:
        """Nothing to find out."""

    def divide(self, names: Sequence[bytes]) -> dict[ValkeyServer, Sequence[int]]:
        """All are the one server's."""
        return {self._server: range(len(names))}

    def follow(self, redirect: Redirect, server: ValkeyServer) -> ValkeyServer:
        """The server is a cluster's node, which only a cluster's topology can use."""
        raise TierUnavailableError(
            "the server is a node of a cluster (is_cluster must say so): "
            f"slot {redirect.slot} is at {redirect.host}:{redirect.port}"
        )

    def refresh_soon(self) -> None:
        """Connections that failed are closed, and new ones find the server themselves."""

    def close(self) -> None:
        """See ``Topology``."""
        self._server.close()


class _Cluster(Topology):
    """Slots of a Valkey or Redis Cluster; only primaries are asked."""

    def __init__(
        self,
        hosts: list[tuple[str, int]],
        settings: dict[str, Any],
        make_server: Callable[[ConnectionPool], ValkeyServer],
    ) -> None:
        self._hosts = hosts
        self._settings = settings
        self._make_server = make_server
        self._nodes: Any = None  # redis-py types its nodes in part only
        self._servers: dict[tuple[str, int], ValkeyServer] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-valkey-nodes")
        self._refresh: asyncio.Task[None] | None = None
        self._is_closed = False

    async def ready(self) -> None:
        """See ``Topology``; one discovery at a time, as there is one thread."""
        if self._nodes is None:
            await self._in_thread(self._discover)

    def divide(self, names: Sequence[bytes]) -> dict[ValkeyServer, Sequence[int]]:
        """See ``Topology``; nobody has a slot that the cluster does not cover."""
        slots = self._nodes.slots_cache
        shares: dict[ValkeyServer, list[int]] = {}
        for index, name in enumerate(names):
            owners = slots.get(key_slot(name))
            if owners:
                server = self._server_at(owners[0].host, owners[0].port)
                shares.setdefault(server, []).append(index)
            else:
                self.refresh_soon()
        return dict(shares)

    def follow(self, redirect: Redirect, server: ValkeyServer) -> ValkeyServer:
        """See ``Topology``; remembers a slot that has moved."""
        host = redirect.host or next(
            (host for (host, _), known in self._servers.items() if known is server), ""
        )
        if not redirect.is_ask:
            moved = MovedError(f"{redirect.slot} {host}:{redirect.port}")
            if redirect.slot in self._nodes.slots_cache:
                self._nodes.move_slot(moved)
            self.refresh_soon()  # where one slot has moved, others have
        return self._server_at(host, redirect.port)

    def refresh_soon(self) -> None:
        """See ``Topology``; what is asked for during a refresh is in it."""
        if self._nodes is None or self._is_closed:
            return
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.get_running_loop().create_task(self._look_again())

    def close(self) -> None:
        """See ``Topology``."""
        self._is_closed = True
        if self._refresh is not None:
            self._refresh.cancel()
        for server in self._servers.values():
            server.close()
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._nodes is not None:
            self._nodes.close()

    def _discover(self) -> None:
        if self._nodes is None:
            self._nodes = find_nodes(self._hosts, self._settings)

    async def _look_again(self) -> None:
        try:
            await self._in_thread(lambda: self._nodes.initialize(self._hosts))
        except TierUnavailableError as exc:
            logger.debug("the cluster's nodes do not say who has what: %s", exc)
            return
        known = {(node.host, node.port) for node in self._nodes.nodes_cache.values()}
        for address in self._servers.keys() - known:
            self._servers.pop(address).close()
        await asyncio.sleep(_REFRESH_INTERVAL_S)  # until then nobody starts another

    def _server_at(self, host: str, port: int) -> ValkeyServer:
        server = self._servers.get((host, port))
        if server is None:
            pool = self._nodes.create_redis_node(host, port, **self._settings).connection_pool
            server = self._servers[host, port] = self._make_server(pool)
        return server

    async def _in_thread(self, work: Callable[[], object]) -> None:
        if self._is_closed:
            raise TierUnavailableError("the connections are closed")
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (RedisError, RedisClusterException, OSError) as exc:
            raise TierUnavailableError(f"{type(exc).__name__}: {exc}") from exc
