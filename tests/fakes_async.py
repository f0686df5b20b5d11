"""Waiting for things in tests without guessing how long they take."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


async def eventually(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    """Poll; the deadline only ends a test that would otherwise hang."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not come to hold in time")
        await asyncio.sleep(0.002)
