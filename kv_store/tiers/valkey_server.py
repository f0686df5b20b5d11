"""One server's connections, each with a thread, and a breaker where other servers can go on."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from kv_store.errors import TierBusyError, TierRefusedError, TierUnavailableError
from kv_store.tiers.valkey_connection import ValkeyConnection
from kv_store.tiers.valkey_exchange import Exchange
from kv_store.tiers.valkey_pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from kv_store.tiers.breaker import CircuitBreaker
    from kv_store.tiers.buffers import BufferPool

T = TypeVar("T")


class ValkeyServer:
    """Lives on one event loop; nothing is connected before the first operation."""

    def __init__(
        self,
        make_connection: Callable[[], object],
        *,
        num_connections: int,
        buffers: BufferPool,
        breaker: CircuitBreaker | None = None,
    ) -> None:
        """Prepare.

        Args:
            make_connection: gives a connection of redis-py that is not connected yet.
            num_connections: operations under way at once; more wait for their turn.
            buffers: where blobs are read to.
            breaker: opens where the server does not answer; meanwhile operations fail at once.
        """
        self.num_connections = num_connections
        self._buffers = buffers
        self._breaker = breaker
        self._connections = [ValkeyConnection(make_connection) for _ in range(num_connections)]
        self._idle = deque(self._connections)  # as many as there are threads
        self._threads = ThreadPoolExecutor(num_connections, thread_name_prefix="kv-valkey")
        self._is_closed = False

    async def run(
        self, operation: Callable[[Exchange], T], deadline: float, *, is_asking: bool = False
    ) -> T:
        """Run an operation in a thread, on a connection of its own.

        Args:
            operation: talks to the server.
            deadline: on the monotonic clock.
            is_asking: see ``Exchange``.

        Raises:
            TierBusyError: the deadline passed before a connection was free.
            TierRefusedError: the server answers with an error.
            TierUnavailableError: it does not answer, or is being left alone.
        """
        if self._is_closed:
            raise TierUnavailableError("the connections are closed")
        if self._breaker is None:
            return await self._in_thread(operation, deadline, is_asking)
        if not self._breaker.allow():
            raise TierUnavailableError("the server is left alone after failures")
        try:
            result = await self._in_thread(operation, deadline, is_asking)
        except TierBusyError:
            self._breaker.record_untried()
            raise
        except TierRefusedError:
            self._breaker.record_success()  # a full server can still be read
            raise
        except BaseException:
            self._breaker.record_failure()  # an allowed probe must always be answered for
            raise
        self._breaker.record_success()
        return result

    def close(self) -> None:
        """Close the connections; operations under way fail. Idempotent."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()
        for connection in self._connections:
            connection.abort()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(
        self, operation: Callable[[Exchange], T], deadline: float, is_asking: bool
    ) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self._on_connection, operation, deadline, is_asking
        )

    def _on_connection(
        self, operation: Callable[[Exchange], T], deadline: float, is_asking: bool
    ) -> T:
        """In a thread."""
        try:
            connection = self._idle.pop()
        except IndexError:
            raise TierUnavailableError("the connections are closed") from None
        try:
            pipeline = Pipeline(connection, self._buffers, deadline, is_asking=is_asking)
            return operation(Exchange(pipeline))
        finally:
            if self._is_closed:
                connection.close()
            self._idle.append(connection)
