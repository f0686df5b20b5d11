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
    # Unbounded, so that the end of a stream has room whatever waits; items wait for theirs before.
    arrivals: asyncio.Queue[T | asyncio.Task[None]] = asyncio.Queue()
    room = asyncio.Semaphore(_MAX_QUEUED)

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream):
            async for item in stream:
                await room.acquire()
                arrivals.put_nowait(item)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(arrivals.put_nowait)
    num_open = len(tasks)
    try:
        while num_open:
            arrival = await arrivals.get()
            if isinstance(arrival, asyncio.Task):
                arrival.result()
                num_open -= 1
            else:
                room.release()
                yield arrival
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
