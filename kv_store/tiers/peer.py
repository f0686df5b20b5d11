"""Another node's page server, as its readers see it: connections, a breaker, and some trust."""

from __future__ import annotations

import socket
import time
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from kv_store.errors import TierUnavailableError
from kv_store.tiers.page_session import served_name
from kv_store.tiers.resp import ProtocolError, command
from kv_store.tiers.valkey_server import ValkeyServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store.keys import PageKey
    from kv_store.tiers.base import Blob
    from kv_store.tiers.breaker import CircuitBreaker
    from kv_store.tiers.buffers import BufferPool
    from kv_store.tiers.page_directory import ServerAddress
    from kv_store.tiers.valkey_exchange import Exchange

T = TypeVar("T")

_MAX_BAD_PAGES = 3
_DISTRUST_S = 60.0
_WELCOME = b"+OK\r\n"


class Peer:
    """Lives on one event loop; connects at the first operation."""

    def __init__(
        self,
        address: ServerAddress,
        *,
        connect_timeout_s: float,
        max_connections: int,
        max_page_bytes: int,
        buffers: BufferPool,
        breaker: CircuitBreaker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            address: of the server.
            connect_timeout_s: limit of one connection attempt, its greeting included.
            max_connections: operations under way at once; more wait for their turn.
            max_page_bytes: a server that sends more is not listened to.
            buffers: where pages are read to.
            breaker: while it is open, operations fail at once.
            clock: seconds, monotonic.
        """
        self._max_page_bytes = max_page_bytes
        self._clock = clock
        self._num_bad_pages = 0
        self._distrusted_until = 0.0
        self._num_under_way = 0
        self._make_server = partial(
            ValkeyServer,
            lambda: _Greeted(address, connect_timeout_s),
            num_connections=max_connections,
            buffers=buffers,
            breaker=breaker,
        )
        self._server = self._make_server()

    @property
    def is_trusted(self) -> bool:
        """Whether it may be asked: not if it gave bad pages lately."""
        return self._clock() >= self._distrusted_until

    @property
    def is_idle(self) -> bool:
        """Whether no operation is under way."""
        return self._num_under_way == 0

    async def contains(self, keys: Sequence[PageKey], deadline: float) -> list[bool]:
        """Whether it holds each page; all False if it does not answer."""
        names = [served_name(key) for key in keys]
        try:
            held = await self._run(lambda exchange: exchange.contains(names), deadline)
        except TierUnavailableError:
            return [False] * len(keys)
        return [answer is True for answer in held]

    async def get(self, keys: Sequence[PageKey], deadline: float) -> list[Blob | None]:
        """Each page's bytes, unverified; all None if it does not answer."""
        names = [served_name(key) for key in keys]
        try:
            return await self._run(
                lambda exchange: exchange.fetch(names, self._max_page_bytes), deadline
            )
        except TierUnavailableError:
            return [None] * len(keys)

    def gave_a_bad_page(self) -> None:
        """One may be an accident of its disk; after a few it is left alone for a while."""
        self._num_bad_pages += 1
        if self._num_bad_pages % _MAX_BAD_PAGES == 0:
            self._distrusted_until = self._clock() + _DISTRUST_S

    def hang_up(self) -> None:
        """Close the connections until the next operation; what is known of the server stays."""
        self._server.close()
        self._server = self._make_server()

    def close(self) -> None:
        """Close the connections; operations under way fail. Idempotent."""
        self._server.close()

    async def _run(self, operation: Callable[[Exchange], T], deadline: float) -> T:
        self._num_under_way += 1
        try:
            return await self._server.run(operation, deadline)
        finally:
            self._num_under_way -= 1


class _Greeted:
    """A connection that has shown its token; in the form of redis-py's, whose place it takes."""

    def __init__(self, address: ServerAddress, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._sock: socket.socket | None = None

    def connect(self) -> None:
        address = self._address
        sock = socket.create_connection((address.host, address.port), self._timeout_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(command(b"AUTH", address.token.encode()))
            _expect(sock, _WELCOME)
        except BaseException:
            sock.close()
            raise
        self._sock = sock

    def disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()


def _expect(sock: socket.socket, answer: bytes) -> None:
    """Read an answer, and not a byte more."""
    received = b""
    while len(received) < len(answer):
        some = sock.recv(len(answer) - len(received))
        received += some
        if not some or not answer.startswith(received):
            raise ProtocolError("it is no page server, or another one by now")
