"""Pages out of the SSD tier, beside raw O_DIRECT reads of the same sizes from the same disk."""

from __future__ import annotations

import asyncio
import mmap
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kv_store.tiers.segment_records import ALIGNMENT
from kv_store.tiers.ssd import SsdTier
from tests.bench.kv.hot_tier import PAGE_BYTES
from tests.bench.kv.measure import race
from tests.kv_pages import make_chain, make_layout

_NUM_THREADS = 2
_BATCH = 8


def measure_ssd_tier() -> list[dict[str, Any]]:
    """One row for each page size and reader."""
    return [row for size, page_bytes in PAGE_BYTES.items() for row in _measure(size, page_bytes)]


def _measure(size: str, page_bytes: int) -> list[dict[str, Any]]:
    num_pages = max(2 * _BATCH, (160 << 20) // page_bytes // _BATCH * _BATCH)
    keys = make_chain(make_layout(), num_pages)
    block = -(-page_bytes // ALIGNMENT) * ALIGNMENT
    total = num_pages * page_bytes
    Path("build").mkdir(exist_ok=True)
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory(dir="build") as folder:
        tier = SsdTier(
            Path(folder),
            budget_bytes=2 << 30,
            segment_bytes=256 << 20,
            num_read_threads=_NUM_THREADS,
        )
        raw_path = Path(folder) / "raw"
        fd = os.open(raw_path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        buffers = [mmap.mmap(-1, block) for _ in range(_BATCH)]
        for number, key in enumerate(keys):
            page = os.urandom(page_bytes)
            loop.run_until_complete(tier.put_many([(key, page)]))
            buffers[0][:page_bytes] = page
            os.pwritev(fd, [buffers[0]], number * block)
        threads = ThreadPoolExecutor(_NUM_THREADS)

        def raw() -> int:
            for start in range(0, num_pages, _BATCH):
                numbers = range(start, min(start + _BATCH, num_pages))
                list(
                    threads.map(
                        lambda number: os.preadv(fd, [buffers[number % _BATCH]], number * block),
                        numbers,
                    )
                )
            return total

        async def get_all() -> None:
            for start in range(0, num_pages, _BATCH):
                blobs = await tier.get_many(keys[start : start + _BATCH])
                if any(blob is None or len(blob) != page_bytes for blob in blobs):
                    raise RuntimeError("a page is missing")
                del blobs  # as the decoder does before it asks for the next ones

        def ours() -> int:
            loop.run_until_complete(get_all())
            return total

        speeds = race({"raw O_DIRECT": raw, "paceline": ours}, num_rounds=41, round_s=0.1)
        loop.run_until_complete(tier.aclose())
        threads.shutdown()
        os.close(fd)
    loop.close()
    return [
        {
            "page": size,
            "reader": name,
            "read_gb_per_s": speed.gb_per_s,
            "cpu_s_per_gb": speed.median_cpu_s_per_gb,
            "speed_of_raw": speed.speed_of(speeds["raw O_DIRECT"]),
        }
        for name, speed in speeds.items()
    ]
