"""A disk that hangs; what every tier promises is in the contract tests."""

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest

from kv_store import TierUnavailableError
from kv_store.tiers.segment_log import SegmentLog
from kv_store.tiers.ssd import SsdTier
from tests.kv_pages import make_chain, make_layout, wait_until

KEYS = make_chain(make_layout(), 8)
PATIENT_S = 60.0


@pytest.fixture
def tier(tmp_path):
    return SsdTier(tmp_path, budget_bytes=1 << 22, segment_bytes=1 << 20, num_read_threads=1)


@pytest.fixture
def disk(monkeypatch):
    """Writes while its gate is open, and counts."""
    disk = threading.Event()
    disk.num_writes = 0
    append = SegmentLog.append

    def wait_and_append(log, key, blob):
        disk.num_writes += 1
        assert disk.wait(PATIENT_S)
        return append(log, key, blob)

    monkeypatch.setattr(SegmentLog, "append", wait_and_append)
    yield disk
    disk.set()


async def put_in_vain(tier, key, page):
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await tier.put_many([(key, page.data)])


async def test_pages_that_wait_for_a_disk_that_hangs_leave_memory_with_their_writers(tier, disk):
    await tier.opened()
    pages = [np.zeros(3000, np.uint8) for _ in KEYS]
    left = [weakref.ref(page) for page in pages]
    for key in KEYS:
        await put_in_vain(tier, key, pages.pop(0))
    gc.collect()
    # The first is being written, and the last one's time-out may still refer to it.
    assert [page() for page in left[1:-1]] == [None] * 6
    disk.set()
    assert await tier.put_many([(KEYS[7], b"page")]) == [True]
    assert disk.num_writes == 2
    assert await tier.contains_many(KEYS) == [True, *[False] * 6, True]
    await tier.aclose()


async def test_an_error_that_nobody_waits_for_is_no_obstacle(tier, caplog):
    gate = threading.Event()

    def fail():
        gate.wait(PATIENT_S)
        raise OSError("the disk has gone")

    await tier.opened()
    writing = asyncio.create_task(tier._write(fail))
    await asyncio.sleep(0)
    writing.cancel()
    gate.set()
    assert await tier.put_many([(KEYS[0], b"page")]) == [True]
    gc.collect()
    assert not caplog.records
    await tier.aclose()


async def test_who_waits_while_the_tier_is_closed_is_told(tier, disk):
    await tier.opened()
    first = asyncio.create_task(tier.put_many([(KEYS[0], b"page")]))
    await asyncio.to_thread(wait_until, lambda: disk.num_writes == 1)
    second = asyncio.create_task(tier.put_many([(KEYS[1], b"page")]))
    await asyncio.sleep(0)
    closing = asyncio.create_task(tier.aclose())
    await asyncio.sleep(0)
    disk.set()
    assert await first == [True]
    with pytest.raises(TierUnavailableError, match="closed"):
        await second
    await closing
    assert disk.num_writes == 1
