"""The ingress's end of direct streams: one connection to one target replica.

What arrives together is handed on together, so that a reader that falls behind catches up at the
price of one item.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, cast

from deployments.token_server import ENDPOINT_KEY, KEY_KEY, keep_alive
from deployments.token_wire import (
    MAX_LINE_BYTES,
    VERSION,
    Admission,
    Cancel,
    Delta,
    Failure,
    Hello,
    MessageReader,
    Start,
    Welcome,
    WireError,
    encode,
    error_of,
    from_wire,
    named_delta,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from deployments.engine.types import GenerationRequest, TokenDelta
    from deployments.token_wire import Message

logger = logging.getLogger(__name__)

_DIAL_TIMEOUT_S = 5.0
_REDIAL_PAUSE_S = 1.0


class LinkLostError(Exception):
    """The connection is gone, and with it, most likely, the replica."""


class TokenLink:
    """Dials as soon as it is made, and again when it is asked for while it is down.

    Used from one event loop. Nothing here waits: while the link is down, callers go another way.

    Args:
        endpoint: "host:port".
        key: that the server wants to see.
    """

    def __init__(self, endpoint: str, key: str) -> None:
        self._endpoint = endpoint
        self._key = key
        self._connection: _Connection | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._next_dial_s = 0.0
        self.is_open()

    @classmethod
    def of(cls, metadata: Mapping[str, object]) -> Self | None:
        """The link to a replica with this metadata, if it serves direct streams."""
        endpoint, key = metadata.get(ENDPOINT_KEY), metadata.get(KEY_KEY)
        if isinstance(endpoint, str) and isinstance(key, str) and endpoint:
            return cls(endpoint, key)
        return None

    @property
    def num_open(self) -> int:
        """Streams of this side that have not ended."""
        return len(self._connection.streams) if self._connection is not None else 0

    def is_open(self) -> bool:
        """Whether streams can be started now; if not, sees to it that they soon can be."""
        if self._connection is not None and self._connection.is_welcome:
            return True
        loop = asyncio.get_running_loop()
        if self._dialling is None and loop.time() >= self._next_dial_s:
            self._dialling = loop.create_task(self._dial(), name=f"dial-{self._endpoint}")
        return False

    def start(self, request: GenerationRequest, max_running: int) -> TokenStream:
        """Ask for one sequence.

        Args:
            request: without hidden states.
            max_running: see ``token_wire.Start``.

        Raises:
            LinkLostError: the link is down.
        """
        if self._connection is None:
            raise LinkLostError(self._endpoint)
        return self._connection.start(request, max_running)

    async def _dial(self) -> None:
        loop = asyncio.get_running_loop()
        host, _, port = self._endpoint.rpartition(":")
        connection = _Connection(self._key, self._lost)
        try:
            async with asyncio.timeout(_DIAL_TIMEOUT_S):
                await loop.create_connection(lambda: connection, host, int(port))
                await connection.welcomed
            self._connection = connection
        except (OSError, ValueError, LinkLostError, TimeoutError) as error:
            logger.info("no direct streams from %s yet: %s", self._endpoint, error or "no answer")
            connection.abort()
            self._next_dial_s = loop.time() + _REDIAL_PAUSE_S
        finally:
            self._dialling = None

    def _lost(self) -> None:
        self._connection = None


class TokenStream:
    """Deltas of one sequence; the first one only names the replica, once it takes the request.

    What has come and was not taken yet is bounded by the request's ``max_tokens``.
    """

    def __init__(self, request: GenerationRequest, cancel: Callable[[], None]) -> None:
        self.request = request
        loop = asyncio.get_running_loop()
        self.admission: asyncio.Future[Admission] = loop.create_future()
        self._cancel = cancel
        self._loop = loop
        self._ready: list[TokenDelta] = []
        self._end: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._on_end: list[Callable[[], None]] = []

    async def take(self) -> tuple[TokenDelta, ...]:
        """All that is there, as soon as something is.

        Raises:
            StopAsyncIteration: the last delta was taken.
            LinkLostError: the connection is gone.
            EngineError: from the engine.
            RuntimeError: the target has a fault.
        """
        while not self._ready:
            if self._end is not None:
                raise self._end
            self._waiter = self._loop.create_future()
            await self._waiter
        ready, self._ready = tuple(self._ready), []
        return ready

    def cancel(self) -> None:
        """Take no more; the sequence ends at the replica."""
        if self._end is None:
            self._cancel()
            self.end(asyncio.CancelledError())

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call back when nothing more comes, however it ended."""
        if self._end is None:
            self._on_end.append(callback)
        else:
            callback()

    def push(self, delta: TokenDelta) -> None:
        """One more."""
        self._ready.append(delta)
        self._wake()

    def end(self, how: BaseException) -> None:
        """Nothing more comes."""
        self._end = how
        if not self.admission.done():
            self.admission.set_exception(how)
            self.admission.exception()  # somebody may not be waiting for it
        self._wake()
        for callback in self._on_end:
            callback()
        self._on_end.clear()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One target replica."""

    def __init__(self, key: str, on_lost: Callable[[], None]) -> None:
        self._key = key
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._reader = MessageReader(MAX_LINE_BYTES)
        self._ids = itertools.count()
        self._replica_id = ""
        self.streams: dict[int, TokenStream] = {}
        self.welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_welcome(self) -> bool:
        """Whether the server has let us in, and is still there."""
        return self._transport is not None and self.welcomed.done()

    def start(self, request: GenerationRequest, max_running: int) -> TokenStream:
        """See ``TokenLink.start``."""
        stream_id = next(self._ids)

        def cancel() -> None:
            self.streams.pop(stream_id, None)
            self._send(Cancel(stream_id))

        stream = self.streams[stream_id] = TokenStream(request, cancel)
        self._send(Start(stream_id, max_running, request))
        return stream

    def abort(self) -> None:
        """Hang up at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        keep_alive(transport)
        self._send(Hello(VERSION, self._key))

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                self._take(message)
        except WireError as error:
            logger.error("a target replica is cut off: it sent %s", error)  # noqa: TRY400
            self.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        lost = LinkLostError(str(error or "the replica hung up"))
        if not self.welcomed.done():
            self.welcomed.set_exception(lost)
            self.welcomed.exception()  # nobody may be waiting any more
        self._on_lost()
        streams, self.streams = self.streams, {}
        for stream in streams.values():
            stream.end(lost)

    def _take(self, message: Message) -> None:
        if isinstance(message, Delta):
            if stream := self.streams.get(message.stream):
                stream.push(from_wire(message, stream.request, self._replica_id))
                if message.finish_reason is not None:
                    self._end(message.stream, StopAsyncIteration())
        elif isinstance(message, Admission):
            if stream := self.streams.get(message.stream):
                if not stream.admission.done():  # it is cancelled with the task that waits for it
                    stream.admission.set_result(message)
                if message.is_accepted:
                    stream.push(named_delta(stream.request, self._replica_id))
                else:
                    self._end(message.stream, StopAsyncIteration())
        elif isinstance(message, Failure):
            self._end(message.stream, error_of(message))
        elif isinstance(message, Welcome) and not self.welcomed.done():
            self._replica_id = message.replica_id
            if message.version == VERSION:
                self.welcomed.set_result(None)
            else:
                self.welcomed.set_exception(LinkLostError(f"it speaks version {message.version}"))
        else:
            raise WireError(f"a {type(message).__name__} out of place")

    def _end(self, stream_id: int, how: BaseException) -> None:
        # A stream that was cancelled here may still be spoken of there.
        if stream := self.streams.pop(stream_id, None):
            stream.end(how)

    def _send(self, message: Message) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(message))
