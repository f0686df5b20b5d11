"""Ordinary clients for what is not the data path: every primary that an address leads to."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from redis import Redis, RedisError
from redis.exceptions import RedisClusterException

from kv_store.errors import PageCorruptError, TierUnavailableError
from kv_store.tiers.parts import MAGIC, read_manifest
from kv_store.tiers.valkey_exchange import CLAIM_SUFFIX, NOTE_SUFFIX
from kv_store.tiers.valkey_topology import (
    DEFAULT_PORT,
    connection_settings,
    find_nodes,
    server_pool,
    split_url,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from redis import ConnectionPool

    from kv_store.tiers.valkey_topology import ValkeyAddress

_SCAN_COUNT = 1000
_NAME = re.compile(rb"kv:\{[0-9a-f]{32}:[0-9a-f]{64}\}")


@contextmanager
def admin_clients(address: ValkeyAddress, timeout_s: float) -> Iterator[list[Redis]]:
    """A client for each primary: of a single server or a service of Sentinels, one.

    Args:
        address: where they are.
        timeout_s: of each connection attempt and each reply.

    Raises:
        TierUnavailableError: also for whatever a client raises within the context.
    """
    settings = connection_settings(timeout_s, timeout_s)
    with ExitStack() as opened:
        try:
            if address.is_cluster:
                pools = _primary_pools(address, settings, opened)
            else:
                pools = [server_pool(address, settings)]
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


class StoredPage(NamedTuple):
    """What a server holds of one page.

    Attributes:
        names: of its strings. A large page has parts, and the server may let them outlive it.
        num_bytes: of all of them.
    """

    names: tuple[bytes, ...]
    num_bytes: int


def stored_pages(client: Redis) -> dict[bytes, StoredPage]:
    """All pages of a server, by name."""
    # SCAN may show a key twice while the server moves its table.
    found = [
        (match[0], name)
        for name in set(client.scan_iter(match="kv:{*", count=_SCAN_COUNT))
        if (match := _NAME.match(name)) and not name.endswith((CLAIM_SUFFIX, NOTE_SUFFIX))
    ]
    pages: dict[bytes, StoredPage] = {}
    for start in range(0, len(found), _SCAN_COUNT):
        batch = found[start : start + _SCAN_COUNT]
        with client.pipeline(transaction=False) as pipeline:
            for _, name in batch:
                pipeline.strlen(name)
            lengths = pipeline.execute()
        for (page, name), length in zip(batch, lengths, strict=True):
            names, num_bytes = pages.get(page, StoredPage((), 0))
            pages[page] = StoredPage((*names, name), num_bytes + int(length))
    return pages


def read_page(client: Redis, name: bytes) -> bytes | None:
    """A page's blob, without counting as use of it; None if it is not there.

    Raises:
        PageCorruptError: a part of it is missing.
    """
    value = _bytes(client.get(name))
    manifest = None if value is None else read_manifest(value)
    if manifest is None:
        return value
    parts = [_bytes(client.get(part)) for part in manifest.part_names(name)]
    if any(part is None for part in parts):
        raise PageCorruptError("a part of it is missing")
    return manifest.head + b"".join(part for part in parts if part is not None)


def drop_page(client: Redis, name: bytes, found: Sequence[bytes] = ()) -> bool:
    """Forget a page and its parts; whether any of it was there.

    Args:
        client: of its server.
        name: of the page.
        found: names of its strings; without them, parts that outlived the page stay.
    """
    manifest = None
    if client.getrange(name, 0, len(MAGIC) - 1) == MAGIC:
        value = _bytes(client.get(name))
        manifest = None if value is None else read_manifest(value)
    parts = manifest.part_names(name) if manifest else []
    return bool(client.unlink(name, *parts, *found))


def drop_namespace(client: Redis, namespace_id: bytes) -> int:
    """Forget all pages of a namespace; how many there were.

    Whatever goes with them goes too: their parts, claims and notes, and the ledger of the quota.
    """
    found = client.scan_iter(match=b"kv:{%b:*" % namespace_id.hex().encode(), count=_SCAN_COUNT)
    num_pages = 0
    while names := list(islice(found, _SCAN_COUNT)):
        pipeline = client.pipeline(transaction=False)
        for name in names:  # one by one: in a cluster they are of different slots
            pipeline.unlink(name)
        dropped = pipeline.execute()
        num_pages += sum(
            bool(count) and _NAME.fullmatch(name) is not None
            for name, count in zip(names, dropped, strict=True)
        )
    return num_pages


def _bytes(value: object) -> bytes | None:
    return value if isinstance(value, bytes) else None


def _primary_pools(
    address: ValkeyAddress, settings: dict[str, Any], opened: ExitStack
) -> list[ConnectionPool]:
    hosts, kwargs = split_url(address.url, DEFAULT_PORT)
    nodes: Any = find_nodes(hosts, settings | kwargs)  # redis-py types its nodes in part only
    opened.callback(nodes.close)
    owners = {owners[0].name: owners[0] for owners in nodes.slots_cache.values()}
    return [owners[name].redis_connection.connection_pool for name in sorted(owners)]
