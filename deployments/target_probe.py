"""Whether the target pool answers; asked by health checks, remembered for a moment."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deployments.serve_compat import Handle

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 2.0
_REMEMBERED_S = 1.0


class TargetProbe:
    """Asks any target replica for its health; concurrent callers share one question."""

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
                await self._ping.remote()
            self._ready = True
        except Exception as error:  # noqa: BLE001 - root of the task: any failure means "not ready"
            logger.info("the target pool did not answer: %s", type(error).__name__)
            self._ready = False
        self._asked_at = time.monotonic()
        return self._ready
