"""One connection to a server: redis-py opens it, page bytes then bypass redis-py.

Addresses, TLS, credentials and the handshake stay redis-py's job. Requests then leave with
``sendmsg`` from where their bytes lie, and replies arrive with ``recv_into`` where they shall be.
Every exchange has a deadline. One that does not end well closes the connection: a reply that was
half read must never be taken for the next one's.
"""

from __future__ import annotations

import select
import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING, Any, TypeVar

from redis.exceptions import RedisError

from kv_store.errors import TierBusyError, TierUnavailableError
from kv_store.tiers.resp import ProtocolError, ReplyReader

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store.tiers.base import Blob

T = TypeVar("T")

_MAX_BUFFERS = 512  # of one sendmsg; the kernel takes 1024
_TLS_RECORD_BYTES = 16 << 10
# Whoever waits for a page is woken up once for so much of it, not for every packet.
_WAKE_BYTES = 512 << 10
_LIMIT_SLACK_S = 0.005


class ValkeyConnection:
    """Used by one thread at a time; ``abort`` may be called from any."""

    def __init__(self, make: Callable[[], Any]) -> None:
        """Prepare; connects at the first exchange.

        Args:
            make: gives a connection of redis-py that speaks RESP2 and is not connected yet.
        """
        self._make = make
        self._connection: Any = None  # redis-py types its connections in part only
        self._stream: _Stream | None = None

    def exchange(
        self, request: Sequence[Blob], read: Callable[[ReplyReader], T], deadline: float
    ) -> T:
        """Send a request and read its replies.

        Args:
            request: the pipelined commands, as buffers.
            read: reads exactly their replies.
            deadline: on the monotonic clock.

        Raises:
            TierBusyError: it has passed; nothing was sent.
            TierUnavailableError: no answer in time, or none that makes sense; the next exchange
                begins with a new connection.
        """
        if time.monotonic() >= deadline:
            raise TierBusyError("no time was left to ask the server")
        try:
            return self._exchange(request, read, deadline)
        except BlockingIOError as exc:  # how the kernel says that a time limit has passed
            self.close()
            raise TierUnavailableError("the server did not answer in time") from exc
        except (RedisError, OSError, ProtocolError) as exc:
            self.close()
            raise TierUnavailableError(f"{type(exc).__name__}: {exc}") from exc
        except BaseException:
            self.close()
            raise

    def send_more(self, request: Sequence[Blob]) -> None:
        """Send further commands; only in the ``read`` of an exchange, which reads their replies."""
        if request and self._stream is not None:
            self._stream.send_all(request)

    def abort(self) -> None:
        """Wake up a thread that waits for the server; its exchange fails."""
        stream = self._stream
        if stream is not None:
            stream.abort()

    def close(self) -> None:
        """Disconnect. Idempotent."""
        connection, self._connection, self._stream = self._connection, None, None
        if connection is not None:
            connection.disconnect()

    def _exchange(
        self, request: Sequence[Blob], read: Callable[[ReplyReader], T], deadline: float
    ) -> T:
        stream = self._connected()
        stream.expect_by(deadline)
        stream.send_all(request)
        reader = ReplyReader(stream)
        result = read(reader)
        if not reader.is_drained:
            raise ProtocolError("more replies than requests")
        return result

    def _connected(self) -> _Stream:
        if self._stream is not None and not self._stream.is_quiet:
            self.close()  # the server hung up meanwhile, or says what nobody asked
        if self._stream is None:
            self._connection = self._make()
            self._connection.connect()
            sock = self._connection._sock  # noqa: SLF001 - redis-py shows its socket nowhere else
            if not isinstance(sock, socket.socket):
                raise ProtocolError("redis-py opened no socket")
            self._stream = _TlsStream(sock) if isinstance(sock, ssl.SSLSocket) else _Stream(sock)
        return self._stream


class _Stream:
    """Blocking transfers with the kernel's own time limits: one system call for a whole page."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._deadline = self._limits_good_until = self._limits_s = 0.0
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)
        sock.setblocking(True)

    def expect_by(self, deadline: float) -> None:
        """What follows shall be over by then, on the monotonic clock."""
        self._deadline = deadline
        self._limits_good_until = 0.0

    @property
    def is_quiet(self) -> bool:
        """Whether the peer is there and has sent nothing."""
        return not self._poller.poll(0)

    def send_all(self, buffers: Sequence[Blob]) -> None:
        """Every byte of every buffer, without joining them."""
        waiting = [memoryview(buffer) for buffer in buffers]
        waiting.reverse()
        while waiting:
            self._limit()
            num_sent = self._sock.sendmsg(waiting[: -_MAX_BUFFERS - 1 : -1])
            while waiting and num_sent >= len(waiting[-1]):
                num_sent -= len(waiting.pop())
            if waiting and num_sent:
                waiting[-1] = waiting[-1][num_sent:]

    def receive_some(self, target: memoryview) -> int:
        """See ``ByteSource``."""
        self._limit()
        return _arrived(self._sock.recv_into(target))

    def receive_all(self, target: memoryview) -> None:
        """See ``ByteSource``."""
        if len(target) > 2 * _WAKE_BYTES:
            # The end is waited for packet by packet, or a rest below the mark would never wake us.
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _WAKE_BYTES)
            self._fill(target[:-_WAKE_BYTES])
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            target = target[-_WAKE_BYTES:]
        self._fill(target)

    def _fill(self, target: memoryview) -> None:
        while target:
            self._limit()
            num_read = _arrived(self._sock.recv_into(target, 0, socket.MSG_WAITALL))
            target = target[num_read:]

    def abort(self) -> None:
        """Make waiting calls return."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # closed already

    def _limit(self) -> None:
        now = time.monotonic()
        if now < self._limits_good_until:
            return  # a call may then last so much beyond the deadline, and costs one less
        remaining = self._remaining()
        self._limits_good_until = now + _LIMIT_SLACK_S
        if abs(remaining - self._limits_s) < _LIMIT_SLACK_S:
            return  # those of the exchange before, which had as much time
        self._limits_s = remaining
        seconds = int(remaining)
        micros = max(1, int((remaining - seconds) * 1e6))  # zero would be for ever
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", seconds, micros))

    def _remaining(self) -> float:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the server did not answer in time")
        return remaining


class _TlsStream(_Stream):
    """TLS has neither ``sendmsg`` nor flags, and keeps its time in Python."""

    @property
    def is_quiet(self) -> bool:
        """See ``_Stream``; session tickets that nobody has read yet are not an answer."""
        self._sock.settimeout(0)
        try:
            self._sock.recv(1)  # an end, or what nobody asked for
        except ssl.SSLWantReadError:
            return True  # it has read the tickets, and there was nothing behind them
        except OSError:
            return False
        return False

    def send_all(self, buffers: Sequence[Blob]) -> None:
        """See ``_Stream``."""
        small = bytearray()
        for buffer in buffers:
            if len(buffer) < _TLS_RECORD_BYTES:
                small += buffer
                continue
            self._send(small)
            self._send(buffer)
            small = bytearray()
        self._send(small)

    def receive_some(self, target: memoryview) -> int:
        """See ``ByteSource``."""
        self._sock.settimeout(self._remaining())
        return _arrived(self._sock.recv_into(target))

    def receive_all(self, target: memoryview) -> None:
        """See ``ByteSource``."""
        while target:
            target = target[self.receive_some(target) :]

    def _send(self, data: Blob | bytearray) -> None:
        self._sock.settimeout(self._remaining())
        self._sock.sendall(data)


def _arrived(num_bytes: int) -> int:
    if num_bytes == 0:
        raise ConnectionResetError("the server closed the connection")
    return num_bytes
