"""Ordinary clients for what is not the data path: every primary that an address leads to."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from redis import ConnectionPool, Redis, RedisError
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, NodesManager
from redis.exceptions import RedisClusterException
from redis.retry import Retry

from kv_store.errors import TierUnavailableError
from kv_store.tiers.valkey_topology import DEFAULT_PORT, sentinel_pool, split_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kv_store.tiers.valkey_topology import ValkeyAddress


@contextmanager
def admin_clients(address: ValkeyAddress, timeout_s: float) -> Iterator[list[Redis]]:
    """A client for each primary: of a single server or a service of Sentinels, one.

    Args:
        address: where they are.
        timeout_s: of each connection attempt and each reply.

    Raises:
        TierUnavailableError: also for whatever a client raises within the context.
    """
    settings: dict[str, Any] = {
        "socket_connect_timeout": timeout_s,
        "socket_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    with ExitStack() as opened:
        try:
            if address.is_cluster:
                pools = _primary_pools(address, settings, opened)
            elif address.sentinels:
                pools = [sentinel_pool(address, settings)]
            else:
                pools = [ConnectionPool.from_url(address.url, **settings)]
            clients = [Redis(connection_pool=pool) for pool in pools]
            for pool in pools:
                opened.callback(pool.disconnect)
            yield clients
        except (RedisError, RedisClusterException, OSError) as exc:
            raise TierUnavailableError(f"{type(exc).__name__}: {exc}") from exc


def public_address(url: str) -> str:
    """Where an URL leads, without credentials."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    hosts = (urlsplit(f"//{host}") for host in parts.netloc.rpartition("@")[2].split(","))
    return ",".join(f"{h.hostname or 'localhost'}:{h.port or DEFAULT_PORT}" for h in hosts)


def _primary_pools(
    address: ValkeyAddress, settings: dict[str, Any], opened: ExitStack
) -> list[ConnectionPool]:
    hosts, kwargs = split_url(address.url, DEFAULT_PORT)
    nodes: Any = NodesManager(
        [ClusterNode(host, port) for host, port in hosts], from_url=True, **settings, **kwargs
    )
    opened.callback(nodes.close)
    owners = {owners[0].name: owners[0] for owners in nodes.slots_cache.values()}
    return [owners[name].redis_connection.connection_pool for name in sorted(owners)]
