"""Pages one by one, as servers and folders hold them. Looking changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cluster.errors import RequestError
from kv_store.errors import KVStoreError, TierUnavailableError
from kv_store.page_format import check_page, read_header
from kv_store.tiers.segment_records import erase, read_pages
from kv_store.tiers.valkey_admin import (
    admin_clients,
    drop_page,
    public_address,
    read_page,
    stored_pages,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from kv_store.tiers.valkey_topology import ValkeyAddress

_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPage:
    """One page in one tier.

    Attributes:
        namespace: hex; differs for every tenant, model and fidelity.
        page_hash: hex.
        num_bytes: as stored.
        read: its blob; None if it left meanwhile.
        drop: forget it, beside the replicas that use it; False if it left meanwhile.
    """

    tier: str
    where: str
    namespace: str
    page_hash: str
    num_bytes: int
    read: Callable[[], bytes | None]
    drop: Callable[[], bool]

    @property
    def created_s(self) -> float | None:
        """When it was written, Unix time; None if that cannot be read, or it left."""
        try:
            blob = self.read()
            return None if blob is None else read_header(blob).created_ms / 1000
        except KVStoreError:
            return None

    @property
    def problem(self) -> str:
        """Why no reader would take it; empty if every byte of it checks out, or it left."""
        try:
            blob = self.read()
            if blob is not None:
                check_page(blob, bytes.fromhex(self.namespace), bytes.fromhex(self.page_hash))
        except KVStoreError as error:
            return str(error)
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceSum:
    """The pages of one namespace in one tier."""

    tier: str
    where: str
    namespace: str
    num_pages: int
    num_bytes: int


def sum_by_namespace(pages: Iterable[HeldPage]) -> list[NamespaceSum]:
    """Largest first."""
    sums: dict[tuple[str, str, str], tuple[int, int]] = {}
    for page in pages:
        place = page.tier, page.where, page.namespace
        count, num_bytes = sums.get(place, (0, 0))
        sums[place] = count + 1, num_bytes + page.num_bytes
    rows = [
        NamespaceSum(
            tier=tier, where=where, namespace=namespace, num_pages=count, num_bytes=num_bytes
        )
        for (tier, where, namespace), (count, num_bytes) in sums.items()
    ]
    return sorted(rows, key=lambda row: -row.num_bytes)


def select_pages(
    pages: Iterable[HeldPage], *, namespace: str = "", written_before_s: float | None = None
) -> Iterator[HeldPage]:
    """Pages of one namespace, or that are old; a page whose age cannot be read is not old.

    Args:
        pages: where to look.
        namespace: the beginning of its id, hex.
        written_before_s: Unix time; every page is read for it.
    """
    for page in pages:
        if not page.namespace.startswith(namespace.lower()):
            continue
        if written_before_s is not None:
            created_s = page.created_s
            if created_s is None or created_s >= written_before_s:
                continue
        yield page


def valkey_pages(address: ValkeyAddress) -> Iterator[HeldPage]:
    """All pages of a server, or of every shard; sizes include the parts of large ones.

    Raises:
        RequestError: it cannot be reached, or refuses.
    """
    where = public_address(address.url)
    try:
        with admin_clients(address, _TIMEOUT_S) as clients:
            for client in clients:
                for name, page in stored_pages(client).items():
                    namespace, page_hash = name.decode()[4:-1].split(":")
                    yield HeldPage(
                        tier="valkey",
                        where=where,
                        namespace=namespace,
                        page_hash=page_hash,
                        num_bytes=page.num_bytes,
                        read=partial(read_page, client, name),
                        drop=partial(drop_page, client, name, page.names),
                    )
    except TierUnavailableError as error:
        raise RequestError(f"Valkey at {where}: {error}") from error


def ssd_pages(root: Path) -> Iterator[HeldPage]:
    """All pages that starts in these folders would find; replicas may be using them.

    Raises:
        RequestError: the file system refuses.
    """
    try:
        for folder in sorted(root.glob("replica-*")):
            for key, record in read_pages(folder).items():
                yield HeldPage(
                    tier="ssd",
                    where=str(folder),
                    namespace=key.namespace_id.hex(),
                    page_hash=key.page_hash.hex(),
                    num_bytes=record.length,
                    read=_tolerant(record.read_blob),
                    drop=partial(erase, record),
                )
    except OSError as error:
        raise RequestError(f"{root}: {error}") from error


def _tolerant(read: Callable[[], bytes]) -> Callable[[], bytes | None]:
    def tolerant() -> bytes | None:
        try:
            return read()
        except FileNotFoundError:
            return None  # the file was reclaimed meanwhile

    return tolerant
