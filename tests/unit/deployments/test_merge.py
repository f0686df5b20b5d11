from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from deployments.merge import merge

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Source:
    def __init__(self, items: list[int], *, fails: bool = False, hangs: bool = False) -> None:
        self.items = items
        self.fails = fails
        self.hangs = hangs
        self.is_closed = False

    async def stream(self) -> AsyncGenerator[int, None]:
        try:
            for item in self.items:
                await asyncio.sleep(0)
                yield item
            if self.fails:
                raise ValueError("broken source")
            if self.hangs:
                await asyncio.Event().wait()
        finally:
            self.is_closed = True


@pytest.mark.parametrize("num_sources", [1, 2, 5])
async def test_all_items_arrive_each_source_in_order(num_sources: int) -> None:
    sources = [Source([1000 * n + i for i in range(200)]) for n in range(num_sources)]
    merged = [item async for item in merge([source.stream() for source in sources])]
    assert sorted(merged) == sorted(item for source in sources for item in source.items)
    for source in sources:
        assert [item for item in merged if item in set(source.items)] == source.items
    assert all(source.is_closed for source in sources)


@pytest.mark.parametrize("others", [0, 1, 3])
async def test_the_first_error_ends_every_source(others: int) -> None:
    sources = [Source([1], fails=True), *(Source([2], hangs=True) for _ in range(others))]

    async def read() -> list[int]:
        return [item async for item in merge([source.stream() for source in sources])]

    with pytest.raises(ValueError, match="broken source"):
        await asyncio.wait_for(read(), 60)
    assert all(source.is_closed for source in sources)


async def test_a_cancelled_source_ends_the_merged_stream() -> None:
    async def cancelled() -> AsyncGenerator[int, None]:
        yield 1
        raise asyncio.CancelledError

    source = Source([], hangs=True)
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(20):
            _ = [item async for item in merge([cancelled(), source.stream()])]
    assert source.is_closed


@pytest.mark.parametrize("num_sources", [1, 3])
async def test_closing_the_merged_stream_closes_every_source(num_sources: int) -> None:
    sources = [Source([1], hangs=True) for _ in range(num_sources)]
    async with aclosing(merge([source.stream() for source in sources])) as merged:
        for _ in range(num_sources):
            await anext(merged)
    assert all(source.is_closed for source in sources)


async def test_a_slow_reader_slows_the_sources_down() -> None:
    sources = [Source(list(range(1000))) for _ in range(2)]
    produced = 0

    async def counted(source: Source) -> AsyncGenerator[int, None]:
        nonlocal produced
        async for item in source.stream():
            produced += 1
            yield item

    async with aclosing(merge([counted(source) for source in sources])) as merged:
        await anext(merged)
        for _ in range(500):
            await asyncio.sleep(0)
        assert produced < 100
