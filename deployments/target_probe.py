"""Whether the target pool answers; asked by health checks, remembered for a moment."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from deployments.engine.errors import EngineGoneError
from deployments.ping import Ping
from deployments.serve_compat import is_replica_lost, original_error

if TYPE_CHECKING:
    from deployments.serve_compat import Handle

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 2.0
_REMEMBERED_S = 1.0
_RETRY_S = 0.05


class TargetProbe:
    """Asks target replicas until one is well; concurrent callers share one question."""

    def __init__(self, target: Handle) -> None:
        self._ping = target.options(method_name="ping")
        self._asking: asyncio.Task[bool] | None = None
        self._ready = False
        self._asked_at = -_REMEMBERED_S

    async def is_ready(self) -> bool:
        """Whether a target replica answered within the last moment."""
        if time.monotonic() - self._asked_at < _REMEMBERED_S:
            return self._ready
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(self._asking)

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await self._ask_one_after_the_other()
            self._ready = True
        except Exception as error:  # noqa: BLE001 - root of the task: any failure means "not ready"
            logger.info("the target pool did not answer: %s", type(error).__name__)
            self._ready = False
        self._asked_at = time.monotonic()
        return self._ready

    async def _ask_one_after_the_other(self) -> None:
        """Return once a replica is well; a sick one says nothing about the pool."""
        sick: list[str] = []
        while True:
            try:
                await self._ping.remote(Ping(avoid_replicas=tuple(sick)))
            except Exception as failure:
                error = original_error(failure)
                if not is_replica_lost(error):
                    raise
                if isinstance(error, EngineGoneError) and error.replica_id:
                    sick.append(error.replica_id)
            else:
                return
            await asyncio.sleep(_RETRY_S)
