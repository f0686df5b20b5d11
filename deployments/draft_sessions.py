"""Which draft replica serves which sequence of this target replica.

Every sequence that may be speculated holds one slot of a draft replica for its life, chosen by
Serve's router, so that routing, autoscaling and back-pressure see it. All of it happens beside the
tokens: a slow, full or absent draft pool costs nothing but drafts.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deployments.serve_compat import Handle

logger = logging.getLogger(__name__)

ENDPOINT_KEY = "draft_endpoint"
"""Replica metadata: where the draft replica's gRPC server listens."""

_RETRY_S = 0.5
_MAX_RETRY_S = 2.0
_CHOOSE_TIMEOUT_S = 30.0
_CLOSE_TIMEOUT_S = 2.0


class PoolLinks(Protocol):
    """The speculator's two methods that matter here."""

    def attach(self, request_id: str, endpoint: str) -> None:
        """The request may use the draft replica at ``endpoint``."""

    def detach(self, request_id: str) -> None:
        """It may not any more."""


class DraftSessions:
    """Holds draft replicas for running sequences. Used from one event loop."""

    def __init__(self, pool: Handle, links: PoolLinks) -> None:
        self._pool = pool
        self._links = links
        # Sessions hold the event of their endpoint; with the last of them it goes.
        self._lost: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_attached = 0

    @contextmanager
    def session(self, request_id: str) -> Iterator[None]:
        """Keep a draft replica for the request while the block runs; nothing here waits."""
        task = asyncio.create_task(self._keep(request_id), name=f"draft-session-{request_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            yield
        finally:
            # Giving the slot back is a remote call; the task makes it on its own.
            task.cancel()

    async def close(self) -> None:
        """Give back every slot."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_TIMEOUT_S)

    def link_lost(self, endpoint: str) -> None:
        """The stream to ``endpoint`` is gone; its sequences choose again. From any thread."""
        self._loop.call_soon_threadsafe(self._mark_lost, endpoint)

    def _mark_lost(self, endpoint: str) -> None:
        event = self._lost.pop(endpoint, None)
        if event is not None:
            event.set()

    async def _keep(self, request_id: str) -> None:
        pause_s = _RETRY_S
        while True:
            try:
                await self._hold_one(request_id)
                pause_s = _RETRY_S
            except TimeoutError:
                logger.debug("no draft replica had room for %s", request_id)
            except Exception as error:  # noqa: BLE001 - root of the task: drafts are optional
                logger.warning("no draft replica for %s: %s", request_id, type(error).__name__)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_RETRY_S)

    async def _hold_one(self, request_id: str) -> None:
        """Hold one replica until its link is lost."""
        choosing = self._pool.choose_replica()
        async with asyncio.timeout(_CHOOSE_TIMEOUT_S):
            selection = await choosing.__aenter__()
        try:
            endpoint = _endpoint(selection.replica_metadata)
            if endpoint is None:
                logger.warning("draft replica %s publishes no endpoint", selection.replica_id)
                return
            lost = self._lost.setdefault(endpoint, asyncio.Event())
            self._links.attach(request_id, endpoint)
            self.num_attached += 1
            try:
                await lost.wait()
            finally:
                self.num_attached -= 1
                self._links.detach(request_id)
        finally:
            await choosing.__aexit__(None, None, None)


def _endpoint(metadata: dict[str, Any]) -> str | None:
    endpoint = metadata.get(ENDPOINT_KEY)
    return endpoint if isinstance(endpoint, str) and endpoint else None
