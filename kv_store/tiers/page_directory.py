"""Where pages are that other nodes hold: a short record beside each page's name in the hot tier.

    record = "1" || " " || token (32 hex digits) || " " || port || " " || host

A record ends by itself, and its writer renews it while it lives and holds the page. It is a hint:
the page may have left, or its node; and nothing that is found by it is taken unseen.
"""

from __future__ import annotations

import re
import socket
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from kv_store.config import HOST_PATTERN
from kv_store.tiers.valkey_batches import ValkeyBatches, page_name
from kv_store.tiers.valkey_exchange import Exchange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_store.keys import PageKey
    from kv_store.tiers.valkey_topology import ValkeyAddress

_RECORD = re.compile(
    rb"1 ([0-9a-f]{32}) ([0-9]{1,5}) (?=.{1,253}$)(" + HOST_PATTERN.encode() + rb")"
)
_LOOPBACK = "127.0.0.1"


class ServerAddress(NamedTuple):
    """One page server of one process.

    Attributes:
        token: 32 hex digits; different after every start.
    """

    host: str
    port: int
    token: str

    def __repr__(self) -> str:
        return f"{self.host}:{self.port}"  # tokens are for the server only

    def pack(self) -> bytes:
        """The record."""
        return f"1 {self.token} {self.port} {self.host}".encode()


def read_record(record: bytes) -> ServerAddress | None:
    """The address in a record; None if it is none."""
    match = _RECORD.fullmatch(record)
    if match is None or not 0 < int(match[2]) < 1 << 16:
        return None
    return ServerAddress(match[3].decode(), int(match[2]), match[1].decode())


class PageDirectory:
    """Reads and writes records, or raises ``TierUnavailableError``. Lives on one event loop."""

    def __init__(
        self, address: ValkeyAddress, *, connect_timeout_s: float, operation_timeout_s: float
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            address: of the hot tier.
            connect_timeout_s: limit of one connection attempt.
            operation_timeout_s: limit of one operation.
        """
        self._address = address
        # One connection of its own: a look-up shall not queue behind pages.
        self._batches = ValkeyBatches(
            address,
            connect_timeout_s=connect_timeout_s,
            operation_timeout_s=operation_timeout_s,
            max_connections=1,
        )

    async def find(self, keys: Sequence[PageKey]) -> list[ServerAddress | None]:
        """A server that has, or had, each page."""
        names = [page_name(key) for key in keys]
        none: bytes | None = None
        records = await self._batches.run(Exchange.notes, names, names, miss=none)
        return [None if record is None else read_record(record) for record in records]

    async def publish(
        self, keys: Sequence[PageKey], server: ServerAddress, duration_s: float
    ) -> None:
        """Say that a server has pages, in place of what was said before."""
        names = [page_name(key) for key in keys]
        note = partial(Exchange.note, value=server.pack(), duration_ms=int(1000 * duration_s))
        await self._batches.run(note, names, names, miss=False)

    async def forget(self, keys: Sequence[PageKey]) -> None:
        """Nobody shall look for these pages until their server says again that it has them."""
        names = [page_name(key) for key in keys]
        await self._batches.run(Exchange.forget_notes, names, names, miss=False)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self._batches.close()


def own_address(address: ValkeyAddress) -> str:
    """The address of this node on its way to the hot tier, by which other nodes reach it too.

    Raises:
        OSError: there is no way, or the name does not resolve.
    """
    parts = urlsplit(address.sentinels or address.url)
    if parts.scheme == "unix":
        return _LOOPBACK
    first = urlsplit("//" + parts.netloc.rpartition("@")[2].split(",")[0])
    host = first.hostname or "localhost"
    *_, (family, _, _, _, target) = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # sends nothing: the kernel only chooses the route
        return str(probe.getsockname()[0])
