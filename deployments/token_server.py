"""The target's end of direct streams: many generations on one connection of each ingress replica.

Serve's own streams pickle every item, pass it through five generators and make an RPC of every
request. Here an item is one line, and lines that are ready together leave in one write.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

from deployments.engine.errors import EngineError
from deployments.token_wire import (
    MAX_LINE_BYTES,
    VERSION,
    Admission,
    Cancel,
    Failure,
    Hello,
    MessageReader,
    Start,
    Welcome,
    WireError,
    encode,
    failure_of,
    to_wire,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from deployments.engine.types import GenerationRequest, TokenDelta
    from deployments.token_wire import Message

    Generate = Callable[[GenerationRequest], AsyncGenerator[TokenDelta, None]]

logger = logging.getLogger(__name__)

ENDPOINT_KEY = "token_endpoint"
"""Replica metadata: where the server listens."""
KEY_KEY = "token_key"
"""Replica metadata: what a caller must show. Serve tells it to routers alone."""

_MAX_HELLO_BYTES = 1024
_HELLO_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 5.0
_MAX_CONNECTIONS = 1024


class TokenServer:
    """Serves whoever knows its key. Used from one event loop.

    Args:
        generate: one sequence; closing it aborts the sequence.
        replica_id: told to callers.
    """

    def __init__(self, generate: Generate, replica_id: str) -> None:
        self.generate = generate
        self.replica_id = replica_id
        self.key = secrets.token_hex(32)
        self.num_running = 0
        self.is_refusing = False
        """Set while the replica is being stopped: what runs goes on, and callers go elsewhere."""
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._endpoint = ""

    async def start(self, host: str) -> None:
        """Listen on a free port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), host, 0)
        port = self._server.sockets[0].getsockname()[1]
        self._endpoint = f"{host}:{port}"

    def metadata(self) -> dict[str, str]:
        """What routers must know to call."""
        return {ENDPOINT_KEY: self._endpoint, KEY_KEY: self.key}

    async def close(self) -> None:
        """Take nothing new, and end what still runs."""
        if self._server is not None:
            self._server.close()
        tasks = [task for each in self._connections for task in each.tasks.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
        for each in tuple(self._connections):
            each.close()

    def add(self, connection: _Connection) -> bool:
        """A peer has connected; False if it is one too many."""
        self._connections.add(connection)
        return len(self._connections) <= _MAX_CONNECTIONS

    def remove(self, connection: _Connection) -> None:
        """It is gone."""
        self._connections.discard(connection)


class _Connection(asyncio.Protocol):
    """One ingress replica."""

    def __init__(self, server: TokenServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._reader = MessageReader(_MAX_HELLO_BYTES)
        self._is_known = False
        self._writable = asyncio.Event()
        self._writable.set()
        self._greeting: asyncio.TimerHandle | None = None
        self._waiting: list[bytes] = []
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        keep_alive(transport)
        loop = asyncio.get_running_loop()
        self._greeting = loop.call_later(_HELLO_TIMEOUT_S, self._transport.abort)
        if not self._server.add(self):
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except WireError as error:
            logger.warning("a direct stream is cut off: its peer sent %s", error)
            self.close(abort=True)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        del error
        if self._greeting is not None:
            self._greeting.cancel()
        self._server.remove(self)
        self._writable.set()
        for task in self.tasks.values():
            task.cancel()

    def close(self, *, abort: bool = False) -> None:
        """Hang up; what was written still leaves, unless ``abort``."""
        if self._transport is not None:
            (self._transport.abort if abort else self._transport.close)()

    def _take(self, message: Message) -> None:
        if not self._is_known:
            self._greet(message)
        elif isinstance(message, Start):
            self._begin(message)
        elif isinstance(message, Cancel):
            if task := self.tasks.get(message.stream):
                task.cancel()
        else:
            raise WireError(f"a {type(message).__name__} out of place")

    def _greet(self, message: Message) -> None:
        if not isinstance(message, Hello) or not hmac.compare_digest(
            message.key.encode(), self._server.key.encode()
        ):
            raise WireError("no key, or a wrong one")
        if self._greeting is not None:
            self._greeting.cancel()
        self._is_known = True
        self._reader.max_line_bytes = MAX_LINE_BYTES
        # A caller of another version hangs up.
        self._send(Welcome(VERSION, self._server.replica_id))

    def _begin(self, start: Start) -> None:
        if start.stream in self.tasks:
            raise WireError("a stream twice")
        server = self._server
        is_accepted = server.num_running < start.max_running and not server.is_refusing
        server.num_running += is_accepted
        # One that refuses looks full, or its caller would ask again at once.
        told = max(server.num_running, start.max_running * server.is_refusing)
        if is_accepted:
            running = self._run(start.stream, start.request)
            task = asyncio.create_task(running, name=f"direct-{start.request.request_id}")
            self.tasks[start.stream] = task
            task.add_done_callback(lambda _: self._ended(start.stream))
        self._send_soon(Admission(start.stream, is_accepted, told))

    def _ended(self, stream: int) -> None:
        self._server.num_running -= 1
        del self.tasks[stream]

    async def _run(self, stream: int, request: GenerationRequest) -> None:
        is_finished = False
        try:
            async with aclosing(self._server.generate(request)) as deltas:
                async for delta in deltas:
                    if not self._writable.is_set():
                        await self._writable.wait()
                    is_finished = delta.finish_reason is not None
                    self._send(to_wire(stream, delta))
        except EngineError as error:
            self._send(failure_of(stream, error))
        except Exception as error:
            logger.exception("a generation failed")
            self._send(failure_of(stream, error))
        else:
            if not is_finished:
                self._send(Failure(stream, "RuntimeError", ("the engine's stream has no end",)))

    def _send_soon(self, message: Message) -> None:
        """Together with what the engine says at once, if it does: the peer wakes up once."""
        self._waiting.append(encode(message))
        loop = asyncio.get_running_loop()
        # In the first turn the generation begins, in the second one it may have come to something.
        loop.call_soon(loop.call_soon, self._send_waiting)

    def _send_waiting(self) -> None:
        lines, self._waiting = self._waiting, []
        self._write(b"".join(lines))

    def _send(self, message: Message) -> None:
        self._waiting.append(encode(message))
        self._send_waiting()

    def _write(self, data: bytes) -> None:
        # Writing to a lost connection would only log.
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)


def keep_alive(transport: asyncio.BaseTransport) -> None:
    """Let the kernel notice, in about 25 s, that a peer's machine is gone."""
    connection = transport.get_extra_info("socket")
    options = (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 10),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 5),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
        # Milliseconds; while something is on its way, the kernel asks for no sign of life.
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", 25_000),
    )
    for level, name, value in options:
        # Not every system has those of TCP.
        if hasattr(socket, name):
            connection.setsockopt(level, getattr(socket, name), value)
