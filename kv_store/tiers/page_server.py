"""Gives the pages of this process's folder to other nodes, over TCP, one thread a client.

Whoever connects must first send the server's token, which is found where pages are found: in the
hot tier. So those who may read the hot tier may read these pages, and nobody else. Clients are
bounded, and so is the time each may take for its token, for each command after the one before, and
for an answer; bytes that trickle in do not lengthen it.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import TYPE_CHECKING

from kv_store.tiers.page_session import PageSession
from kv_store.tiers.resp import ProtocolError

if TYPE_CHECKING:
    from kv_store.keys import PageKey
    from kv_store.tiers.base import Blob
    from kv_store.tiers.page_session import PageSource

logger = logging.getLogger(__name__)

_AUTH_S = 5.0
_COMMAND_S = 120.0
_ANSWER_S = 10.0
_JOIN_S = 5.0
_SCARCE_S = 0.1
_RECEIVE_BYTES = 16 << 10
_FLUSH_BYTES = 16 << 10


class PageServer:
    """Listens from ``start`` to ``close``."""

    def __init__(
        self, source: PageSource, *, token: bytes, max_clients: int, max_reads: int
    ) -> None:
        """Prepare; nothing listens yet.

        Args:
            source: of the pages.
            token: what clients must know.
            max_clients: connections at once; one more is closed at once.
            max_reads: pages read at once.
        """
        self._source = _BoundedSource(source, max_reads)
        self._token = token
        self._max_clients = max_clients
        self._lock = threading.Lock()  # guards the two below
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._num_served = 0
        self._is_closed = threading.Event()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None

    @property
    def num_served(self) -> int:
        """Pages given so far."""
        return self._num_served

    def start(self, host: str, port: int = 0) -> int:
        """Listen; the port.

        Raises:
            OSError: the address is not this node's, or the port is taken.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=64)
        self._listener = listener
        self._acceptor = threading.Thread(
            target=self._accept, args=(listener,), name="kv-page-server", daemon=True
        )
        self._acceptor.start()
        return int(listener.getsockname()[1])

    def close(self) -> None:
        """Hang up on everybody. Idempotent."""
        with self._lock:
            self._is_closed.set()
            clients = list(self._clients.items())
        if self._listener is not None:
            _hang_up(self._listener)
        for client, _ in clients:
            _hang_up(client)
        for thread in (self._acceptor, *(thread for _, thread in clients)):
            if thread is not None:
                thread.join(_JOIN_S)
        if self._listener is not None:
            self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        """The acceptor's thread."""
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                # The client has gone, or files are scarce, and then it helps to wait.
                if self._is_closed.wait(_SCARCE_S):
                    return
                continue
            with self._lock:
                if self._is_closed.is_set() or len(self._clients) >= self._max_clients:
                    client.close()
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(client,), name="kv-page-client", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as exc:  # threads are scarce
                    logger.warning("a client of the page server is sent away: %s", exc)
                    client.close()
                    continue
                self._clients[client] = thread

    def _serve(self, client: socket.socket) -> None:
        """A client's thread."""
        session = PageSession(self._source, self._token)
        try:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            deadline = time.monotonic() + _AUTH_S
            while (left_s := deadline - time.monotonic()) > 0:
                client.settimeout(left_s)
                data = client.recv(_RECEIVE_BYTES)
                if not data:
                    return
                if self._answer(client, session, data):
                    deadline = time.monotonic() + _COMMAND_S
        except ProtocolError as exc:
            logger.info("hung up on a client of the page server: %s", exc)
        except OSError as exc:
            logger.debug("a client of the page server has gone: %s", exc)
        finally:
            with self._lock:
                self._clients.pop(client, None)
            client.close()

    def _answer(self, client: socket.socket, session: PageSession, data: bytes) -> bool:
        """Send what small replies there are together, and pages from where they lie.

        Returns:
            Whether there was a whole command.
        """
        client.settimeout(_ANSWER_S)
        small = bytearray()
        has_answered = False
        try:
            for reply in session.receive(data):
                has_answered = True
                if len(reply) < _FLUSH_BYTES:
                    small += reply
                if len(small) >= _FLUSH_BYTES or len(reply) >= _FLUSH_BYTES:
                    client.sendall(small)
                    small.clear()
                if len(reply) >= _FLUSH_BYTES:
                    client.sendall(reply)
        except ProtocolError:
            client.sendall(small)  # what was asked before is still answered
            raise
        finally:
            with self._lock:
                self._num_served += session.num_served
            session.num_served = 0
        client.sendall(small)
        return has_answered


class _BoundedSource:
    """Reads a few pages at once; what the disk refuses is a miss."""

    def __init__(self, source: PageSource, max_reads: int) -> None:
        self._source = source
        self._slots = threading.BoundedSemaphore(max_reads)

    def contains(self, key: PageKey) -> bool:
        return self._source.contains(key)

    def read(self, key: PageKey) -> Blob | None:
        with self._slots:
            try:
                return self._source.read(key)
            except OSError as exc:
                logger.warning("a page for another node cannot be read: %s", exc)
                return None


def _hang_up(client: socket.socket) -> None:
    try:
        client.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it has gone already
