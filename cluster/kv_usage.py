"""What the shared KV tiers hold now, as their servers and folders say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import RequestError
from kv_store.errors import TierUnavailableError
from kv_store.tiers.segment_records import read_pages
from kv_store.tiers.valkey_admin import admin_clients, public_address

if TYPE_CHECKING:
    from pathlib import Path

    from kv_store.tiers.valkey_topology import ValkeyAddress

_TIMEOUT_S = 5.0
_PAGE_KEYS = "kv:{*}"  # parts of large pages have more behind the brace
_SCAN_COUNT = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ValkeyUsage:
    """One server, or all shards of a cluster together.

    Attributes:
        num_pages: keys of pages; other keys of the server are not counted.
        used_bytes: memory of the whole server.
        max_bytes: its limit, 0 for none.
        num_evicted: keys of the whole server that had to leave since its start.
        num_servers: primaries.
    """

    address: str
    num_pages: int
    used_bytes: int
    max_bytes: int
    num_evicted: int
    num_servers: int = 1


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


def valkey_usage(address: ValkeyAddress) -> ValkeyUsage:
    """Ask a server, or every shard.

    Raises:
        RequestError: it cannot be reached, or refuses.
    """
    where = public_address(address.url)
    pages: set[bytes] = set()  # SCAN may show a key twice while a server moves its table
    try:
        with admin_clients(address, _TIMEOUT_S) as clients:
            for client in clients:
                pages.update(client.scan_iter(match=_PAGE_KEYS, count=_SCAN_COUNT))
            infos = [client.info() for client in clients]
    except TierUnavailableError as error:
        raise RequestError(f"Valkey at {where}: {error}") from error
    limits = [int(info["maxmemory"]) for info in infos]
    return ValkeyUsage(
        address=where,
        num_pages=len(pages),
        used_bytes=sum(int(info["used_memory"]) for info in infos),
        max_bytes=sum(limits) if all(limits) else 0,
        num_evicted=sum(int(info["evicted_keys"]) for info in infos),
        num_servers=len(infos),
    )


def ssd_usage(root: Path) -> SsdUsage:
    """Measure a folder; one that does not exist yet is empty."""
    folders = [path for path in root.glob("replica-*") if path.is_dir()]
    files = [path for folder in folders for path in folder.rglob("*")]
    return SsdUsage(path=str(root), num_bytes=sum(map(_size, files)), num_replicas=len(folders))


def count_ssd_pages(root: Path) -> int:
    """Pages that a start would find."""
    return sum(len(read_pages(folder)) for folder in root.glob("replica-*"))


def _size(path: Path) -> int:
    try:
        # What is allocated, not what was asked for: segments may be sparse.
        return path.stat().st_blocks * 512 if path.is_file() else 0
    except FileNotFoundError:
        return 0
