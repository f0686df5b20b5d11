"""Pages out of one Valkey: this tier, redis-py, LMCache's native client, and a bare socket.

Mooncake's store gives the same pages out of a node of its own.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import redis

from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.valkey import ValkeyTier
from kv_store.tiers.valkey_connection import ValkeyConnection
from kv_store.tiers.valkey_exchange import MAX_VALUE_BYTES, Exchange
from kv_store.tiers.valkey_pipeline import Pipeline
from kv_store.tiers.valkey_topology import ValkeyAddress
from tests.bench.kv.lmcache_peer import LMCacheClient, load_library
from tests.bench.kv.measure import race
from tests.bench.kv.mooncake_peer import mooncake_peer
from tests.bench.kv.socket_peer import socket_peer
from tests.kv_pages import make_chain, make_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store import PageKey

NUM_CONNECTIONS = 2
PAGE_BYTES = {"1.47 MB": 1_474_560, "8 MiB": 8 << 20}
_BATCH = 8
_NUM_EXISTS = 2048


def measure_hot_tier() -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of GET speeds, and keys a second of EXISTS by client."""
    library = load_library()
    server = EmbeddedValkey(2 << 30)
    server.start()
    try:
        rows = [
            row
            for size, page_bytes in PAGE_BYTES.items()
            for row in _measure_get(server.url, size, page_bytes, library)
        ]
        return rows, _measure_exists(server.url)
    finally:
        server.stop()


class _DataPath:
    """What the tier does in a thread for a batch of this size: one connection serves it.

    GET into buffers of the caller's, cut to values of the size that the tier writes.
    """

    def __init__(self, url: str) -> None:
        pool = redis.ConnectionPool.from_url(url, protocol=2)
        self._connection = ValkeyConnection(pool.make_connection)

    def get(self, names: Sequence[bytes], buffers: Sequence[memoryview]) -> None:
        """Fill the buffers."""
        pipeline = Pipeline(self._connection, _CallersBuffers(buffers), time.monotonic() + 60)
        values = Exchange(pipeline).fetch(names, MAX_VALUE_BYTES)
        if any(value is not buffer for value, buffer in zip(values, buffers, strict=True)):
            raise RuntimeError("a page is missing")

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()


class _CallersBuffers(BufferPool):
    """In the place of fresh memory: values come in the order of their names."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._buffers = iter(buffers)

    def take(self, num_bytes: int) -> memoryview:
        """The next one."""
        buffer = next(self._buffers)
        if num_bytes != len(buffer):
            raise RuntimeError(f"a page of {num_bytes} bytes instead of {len(buffer)}")
        return buffer


def _tier(url: str) -> ValkeyTier:
    return ValkeyTier(
        ValkeyAddress(url=url),
        ttl_s=3600,
        ttl_head_boost=1,
        connect_timeout_s=5,
        operation_timeout_s=60,
        max_connections=NUM_CONNECTIONS,
    )


def _name(key: PageKey) -> str:
    return f"kv:{{{key.namespace_id.hex()}:{key.page_hash.hex()}}}"


def _batches(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]


def _measure_get(url: str, size: str, page_bytes: int, library: Any) -> list[dict[str, Any]]:
    num_pages = max(2 * _BATCH, (96 << 20) // page_bytes // _BATCH * _BATCH)
    keys = make_chain(make_layout(), num_pages)
    names = [_name(key) for key in keys]
    buffers = [memoryview(mmap.mmap(-1, page_bytes)) for _ in range(_BATCH)]
    total = num_pages * page_bytes
    loop = asyncio.new_event_loop()
    tier = _tier(url)
    address = urlsplit(url)

    async def get_all() -> None:
        for batch in _batches(keys):
            blobs = await tier.get_many(batch)
            if any(blob is None or len(blob) != page_bytes for blob in blobs):
                raise RuntimeError("a page is missing")
            del blobs  # as the decoder does before it asks for the next ones

    def ours() -> int:
        loop.run_until_complete(get_all())
        return total

    with (
        redis.Redis.from_url(url) as client,
        socket_peer(page_bytes, num_pages, NUM_CONNECTIONS) as peer,
        mooncake_peer(buffers, 2 * total) as mooncake,
    ):
        client.flushall()
        for key in keys:
            loop.run_until_complete(tier.put_many([(key, os.urandom(page_bytes))]))

        whole = [f"whole:{name}" for name in names]  # for those who do not split values
        num_parts = -(-page_bytes // MAX_VALUE_BYTES)
        part_bytes = page_bytes // num_parts
        parts: list[bytes] = []
        for name in whole:
            page = os.urandom(page_bytes)
            client.set(name, page)
            if num_parts == 1:
                parts.append(name.encode())
                continue
            for part in range(num_parts):
                parts.append(f"{name}:{part}".encode())
                client.set(parts[-1], page[part * part_bytes : (part + 1) * part_bytes])

        def plain_socket() -> int:
            for batch in _batches(keys):
                peer.receive(buffers[: len(batch)])
            return total

        def redis_py() -> int:
            for batch in _batches(whole):
                pipeline = client.pipeline(transaction=False)
                for name in batch:
                    pipeline.get(name)
                pipeline.execute()
            return total

        data_path = _DataPath(url)

        in_batch = _BATCH * num_parts
        cut = [
            buffer[part * part_bytes : (part + 1) * part_bytes]
            for buffer in buffers
            for part in range(num_parts)
        ]

        def into_buffers() -> int:
            for start in range(0, len(parts), in_batch):
                data_path.get(parts[start : start + in_batch], cut)
            return total

        contestants: dict[str, Callable[[], int]] = {
            "plain socket": plain_socket,
            "paceline data path": into_buffers,
            "paceline tier": ours,
            "redis-py": redis_py,
        }
        native = None
        if library is not None:
            native = LMCacheClient(
                library, "127.0.0.1", address.port or 0, address.password or "", NUM_CONNECTIONS
            )

            def lmcache() -> int:
                for batch in _batches(whole):
                    native.get(batch, buffers[: len(batch)])
                return total

            contestants["LMCache native"] = lmcache
        if mooncake is not None:
            for name in whole:
                mooncake.put(name, os.urandom(page_bytes))

            def from_mooncake() -> int:
                for batch in _batches(whole):
                    mooncake.get(batch)
                return total

            contestants["Mooncake TCP"] = from_mooncake
        speeds = race(contestants, num_rounds=61, round_s=0.1)
        data_path.close()
        if native is not None:
            native.close()
    loop.run_until_complete(tier.aclose())
    loop.close()
    return [
        {
            "page": size,
            "client": name,
            "get_gb_per_s": speed.gb_per_s,
            "client_cpu_s_per_gb": speed.median_cpu_s_per_gb,
            "speed_of_socket": speed.speed_of(speeds["plain socket"]),
            "cpu_of_socket": speed.cpu_of(speeds["plain socket"]),
            "speed_of_lmcache": speed.speed_of(speeds["LMCache native"]) if native else "",
        }
        for name, speed in speeds.items()
    ]


def _measure_exists(url: str) -> dict[str, float]:
    keys = make_chain(make_layout(), _NUM_EXISTS)
    loop = asyncio.new_event_loop()
    tier = _tier(url)
    best = {"paceline": float("inf"), "redis-py": float("inf")}
    with redis.Redis.from_url(url) as client:
        client.flushall()
        for key in keys[::2]:
            client.set(_name(key), b"x")
        for _ in range(7):
            start = time.perf_counter()
            ours = loop.run_until_complete(tier.contains_many(keys))
            best["paceline"] = min(best["paceline"], time.perf_counter() - start)
            start = time.perf_counter()
            pipeline = client.pipeline(transaction=False)
            for key in keys:
                pipeline.exists(_name(key))
            theirs = [bool(reply) for reply in pipeline.execute()]
            best["redis-py"] = min(best["redis-py"], time.perf_counter() - start)
            if ours != theirs or sum(ours) != _NUM_EXISTS // 2:
                raise RuntimeError("the clients disagree")
    loop.run_until_complete(tier.aclose())
    loop.close()
    return {name: _NUM_EXISTS / seconds for name, seconds in best.items()}
