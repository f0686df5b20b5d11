"""What loads from the tier cost the requests that decode beside them."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING, Any

from tests.bench.ttft.replica import Replica, make_prompt

if TYPE_CHECKING:
    from deployments.engine.torch_engine.weights.loader import LoadedModel
    from kv_store import KVStoreConfig

_NUM_STREAMS = 4
_INTERVAL_S = 1.0
_MAX_LOADS = 4
_LONGEST = 4000
_STREAM_PAGES = 32


def measure_neighbours(
    loaded: LoadedModel,
    tiers: KVStoreConfig,
    prompts: list[tuple[int, ...]],
    *,
    seconds: float,
    num_threads: int,
) -> dict[str, Any]:
    """Decoded tokens per second of other requests, undisturbed and with one load per second.

    After one to begin with, four windows: undisturbed, loaded, loaded, undisturbed, as the streams
    grow longer.

    Args:
        loaded: the weights.
        tiers: that hold the prompts.
        prompts: all of one length, taken in turn; more than the pool can keep.
        seconds: of loads, in both windows together.
        num_threads: of the engine.
    """
    pages = len(prompts[0]) // 64
    num_pages = _NUM_STREAMS * _STREAM_PAGES + 2 * pages + 8
    return asyncio.run(_measure(loaded, tiers, prompts, seconds / 2, num_threads, num_pages))


async def _measure(
    loaded: LoadedModel,
    tiers: KVStoreConfig,
    prompts: list[tuple[int, ...]],
    window_s: float,
    num_threads: int,
    num_pages: int,
) -> dict[str, Any]:
    num_decoded = 0
    ttft_s: list[float] = []
    num_skipped = num_from_pool = 0
    turns = itertools.cycle(prompts)
    async with Replica(loaded, tiers, num_threads, num_pages) as replica:

        async def stream(seed: int) -> None:
            nonlocal num_decoded
            while True:
                prompt = make_prompt(64, 2_000_000 + seed)
                async for count in replica.tokens(prompt, _LONGEST):
                    num_decoded += count

        async def load() -> None:
            nonlocal num_from_pool
            prompt = next(turns)
            answer = await replica.answer(prompt)
            ttft_s.append(answer.ttft_s)
            num_from_pool += answer.num_tier_tokens < len(prompt) // 64 * 64

        async def window(*, is_loaded: bool) -> float:
            """Tokens per second."""
            nonlocal num_skipped
            loads: set[asyncio.Task[None]] = set()
            before, began = num_decoded, time.monotonic()
            due = began
            while (now := time.monotonic()) < began + window_s:
                if is_loaded and now >= due:
                    due += _INTERVAL_S
                    if len(loads) < _MAX_LOADS:
                        task = asyncio.create_task(load())
                        loads.add(task)
                        task.add_done_callback(loads.discard)
                    else:
                        num_skipped += 1
                await asyncio.sleep(0.005)
            rate = (num_decoded - before) / (time.monotonic() - began)
            await asyncio.gather(*loads)
            return rate

        streams = [asyncio.create_task(stream(seed)) for seed in range(_NUM_STREAMS)]
        await window(is_loaded=False)  # the streams begin
        quiet, busy = [await window(is_loaded=False)], [await window(is_loaded=True)]
        busy.append(await window(is_loaded=True))
        quiet.append(await window(is_loaded=False))
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return {
        "streams": _NUM_STREAMS,
        "window_s": window_s,
        "undisturbed_tokens_per_s": sum(quiet) / 2,
        "loaded_tokens_per_s": sum(busy) / 2,
        "of_undisturbed": sum(busy) / sum(quiet),
        "loads": len(ttft_s),
        "loads_skipped": num_skipped,
        "loads_partly_from_the_pool": num_from_pool,
        "slowest_load_s": max(ttft_s, default=0.0),
    }
