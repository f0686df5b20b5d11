"""Several async streams as one, in order of arrival."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

T = TypeVar("T")

_MAX_QUEUED = 64


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all streams; a slow reader slows every stream down.

    The first error ends all of them and is raised. Closing the merged stream closes each one.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for first in only:
                yield first
        return
    queue: asyncio.Queue[T | None] = asyncio.Queue(_MAX_QUEUED)

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    await queue.put(item)
        finally:
            # Wakes the reader, which then looks at the finished tasks; a full queue wakes it too.
            if not queue.full():
                queue.put_nowait(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        while True:
            if queue.empty() and all(task.done() for task in tasks):
                break
            item = await queue.get()
            if item is not None:
                yield item
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in tasks:
        task.result()
