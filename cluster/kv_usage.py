"""What the shared KV tiers hold now, as their servers and folders say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import redis

from cluster.errors import RequestError
from cluster.hot_tier import public_address
from kv_store.tiers.segment_log import SegmentLog

if TYPE_CHECKING:
    from pathlib import Path

_TIMEOUT_S = 5.0
_PAGE_KEYS = "kv:{*}"  # parts of large pages have more behind the brace
_SCAN_COUNT = 1000
# Opening a log must reclaim nothing, whatever budget its owner had.
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class ValkeyUsage:
    """One server.

    Attributes:
        num_pages: keys of pages; other keys of the server are not counted.
        used_bytes: memory of the whole server.
        max_bytes: its limit, 0 for none.
        num_evicted: keys of the whole server that had to leave since its start.
    """

    address: str
    num_pages: int
    used_bytes: int
    max_bytes: int
    num_evicted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SsdUsage:
    """One folder with the sub-folders of all replicas.

    Attributes:
        num_bytes: on disk.
        num_replicas: sub-folders.
    """

    path: str
    num_bytes: int
    num_replicas: int


def valkey_usage(url: str) -> ValkeyUsage:
    """Ask a server.

    Raises:
        RequestError: it cannot be reached, or refuses.
    """
    address = public_address(url)
    try:
        with redis.Redis.from_url(
            url, socket_connect_timeout=_TIMEOUT_S, socket_timeout=_TIMEOUT_S
        ) as client:
            # SCAN may show a key twice while the server moves its table.
            pages = set(client.scan_iter(match=_PAGE_KEYS, count=_SCAN_COUNT))
            info = client.info()
    except (redis.RedisError, OSError) as error:
        raise RequestError(f"Valkey at {address}: {type(error).__name__}") from error
    return ValkeyUsage(
        address=address,
        num_pages=len(pages),
        used_bytes=int(info["used_memory"]),
        max_bytes=int(info["maxmemory"]),
        num_evicted=int(info["evicted_keys"]),
    )


def ssd_usage(root: Path) -> SsdUsage:
    """Measure a folder; one that does not exist yet is empty."""
    folders = [path for path in root.glob("replica-*") if path.is_dir()]
    files = [path for folder in folders for path in folder.rglob("*")]
    return SsdUsage(path=str(root), num_bytes=sum(map(_size, files)), num_replicas=len(folders))


def count_ssd_pages(root: Path) -> int:
    """Pages that a start would find; only for a folder that no process uses."""
    num_pages = 0
    for folder in root.glob("replica-*"):
        log = SegmentLog(folder, budget_bytes=_UNLIMITED, segment_bytes=_UNLIMITED // 2)
        num_pages += log.usage().num_pages
        log.close()
    return num_pages


def _size(path: Path) -> int:
    try:
        # What is allocated, not what was asked for: segments may be sparse.
        return path.stat().st_blocks * 512 if path.is_file() else 0
    except FileNotFoundError:
        return 0
