"""Copies of pages from tier to tier, made behind requests' backs.

After a load, its pages are looked up in the other tiers, and those that are worth it (``moves``)
are read once more and written there: up where they pay (promotion), down where only a tier holds
them that may lose them any time (demotion). A page that was served or written once, and that only
a tier with a time to live has, is copied down shortly before that ends. Names wait in the queue,
not bytes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from kv_store.errors import KVStoreError, PageUnsupportedError
from kv_store.moves import ExpiringPages, ReadCounts, worth_copying
from kv_store.page_format import check_page

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Executor

    from kv_store.config import MovesConfig
    from kv_store.keys import PageKey
    from kv_store.tiers.base import Blob
    from kv_store.tiers.guarded import GuardedTier

logger = logging.getLogger(__name__)

_MAX_TRACKED = 1 << 16


class _Served(NamedTuple):
    """Pages of one chain and where each was found; ``counts`` of how often each was served."""

    keys: Sequence[PageKey]
    sources: Sequence[int]
    counts: Sequence[int]


class PageMover:
    """Lives on the store's event loop; only ``wait_until_idle`` may be called from elsewhere."""

    def __init__(
        self,
        *,
        tiers: Sequence[GuardedTier],
        config: MovesConfig,
        codec_threads: Executor,
        batch_pages: int,
        clock: Callable[[], float],
    ) -> None:
        """Wire up.

        Args:
            tiers: hot first.
            config: what is worth a copy, and how much may wait.
            codec_threads: pages are verified here, off the event loop.
            batch_pages: pages copied together.
            clock: seconds, monotonic.
        """
        self._tiers = tiers
        self._config = config
        self._codec_threads = codec_threads
        self._batch_pages = batch_pages
        self._clock = clock
        self._counts = ReadCounts(_MAX_TRACKED)
        self._expiring = ExpiringPages(_MAX_TRACKED)
        self._wake = asyncio.Event()
        self._changed = threading.Condition()  # guards the three below
        self._waiting: deque[_Served] = deque()
        self._num_waiting = 0
        self._num_unfinished = 0
        self.num_dropped = 0

    def served(self, keys: Sequence[PageKey], tier_names: Sequence[str]) -> None:
        """Pages of a chain were served; beyond the queue's bound they are only counted."""
        if not keys:
            return
        places = {tier.name: place for place, tier in enumerate(self._tiers)}
        sources = [places[name] for name in tier_names]
        served = _Served(keys, sources, [self._counts.add(key) for key in keys])
        with self._changed:
            if self._num_waiting + len(keys) > self._config.max_pages:
                self.num_dropped += len(keys)
                return
            self._waiting.append(served)
            self._num_waiting += len(keys)
            self._num_unfinished += 1
        self._wake.set()

    def written(self, key: PageKey, holders: Sequence[GuardedTier]) -> None:
        """A page was written, and these tiers hold it."""
        self._note(key, [tier in holders for tier in self._tiers])
        self._wake.set()

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether all that was served was looked after in time, save what expires later."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_unfinished, timeout_s)

    async def run(self) -> None:
        """Copy until cancelled."""
        while True:
            await self._sleep()
            self._wake.clear()
            while (served := self._take()) is not None:
                try:
                    await self._spread(served)
                except Exception:
                    logger.exception("%d pages were not looked after", len(served.keys))
                finally:
                    with self._changed:
                        self._num_unfinished -= 1
                        self._changed.notify_all()
            while keys := self._expiring.take(self._clock(), self._batch_pages):
                try:
                    await self._rescue(keys)
                except Exception:
                    logger.exception("%d pages that expire were not copied", len(keys))

    async def _sleep(self) -> None:
        """Until something was queued, or is due."""
        due = self._expiring.next_due
        try:
            async with asyncio.timeout(None if due is None else max(0.0, due - self._clock())):
                await self._wake.wait()
        except TimeoutError:
            return

    def _take(self) -> _Served | None:
        with self._changed:
            if not self._waiting:
                return None
            served = self._waiting.popleft()
            self._num_waiting -= len(served.keys)
            return served

    async def _spread(self, served: _Served) -> None:
        """Give a served chain's pages to the tiers that should have them."""
        held = await self._holders(served)
        for place, tier in enumerate(self._tiers):
            if not tier.takes_pages:
                continue
            wanted = worth_copying(
                served.keys,
                served.counts,
                held[place],
                min_reads=self._config.min_reads,
                head_pages=self._config.head_pages,
            )
            for start in range(0, len(wanted), self._batch_pages):
                batch = wanted[start : start + self._batch_pages]
                await self._copy(served, batch, tier, held[place])
        for index, key in enumerate(served.keys):
            self._note(key, [is_held[index] for is_held in held])

    async def _holders(self, served: _Served) -> list[list[bool]]:
        """Of each tier, whether it has each page.

        A tier above the one that served a page did not have it; those below were not asked yet.
        """
        held: list[list[bool]] = []
        for place, tier in enumerate(self._tiers):
            is_held = [source == place for source in served.sources]
            unknown = [index for index, source in enumerate(served.sources) if source < place]
            if (
                unknown and tier.takes_pages
            ):  # an empty question would be answered, and close a breaker
                answers = await tier.contains([served.keys[index] for index in unknown])
                for index, answer in zip(unknown, answers, strict=True):
                    is_held[index] = answer
            held.append(is_held)
        return held

    async def _copy(
        self, served: _Served, batch: Sequence[int], target: GuardedTier, is_held: list[bool]
    ) -> None:
        """Copy pages of a chain from where they were served, and mark them as held."""
        if not target.is_writable:
            return
        for place in sorted({served.sources[index] for index in batch}):
            indices = [index for index in batch if served.sources[index] == place]
            copied = await self._copy_keys(
                [served.keys[index] for index in indices], self._tiers[place], target
            )
            for index in indices:
                is_held[index] = served.keys[index] in copied

    async def _copy_keys(
        self, keys: Sequence[PageKey], source: GuardedTier, target: GuardedTier
    ) -> set[PageKey]:
        """The pages that the target holds afterwards."""
        blobs = await source.get(keys)
        sound = await asyncio.gather(
            *(self._verify(key, blob, source) for key, blob in zip(keys, blobs, strict=True))
        )
        items = [
            (key, blob)
            for key, blob, is_sound in zip(keys, blobs, sound, strict=True)
            if is_sound and blob is not None
        ]
        if not items:
            return set()
        accepted = await target.put(items)
        copied = {key for (key, _), is_ok in zip(items, accepted, strict=True) if is_ok}
        is_up = self._tiers.index(target) < self._tiers.index(source)
        target.count_moved(len(copied), is_up=is_up)
        return copied

    async def _verify(self, key: PageKey, blob: Blob | None, source: GuardedTier) -> bool:
        """Whether a blob is the page; damage must not spread."""
        if blob is None:
            return False
        try:
            await asyncio.get_running_loop().run_in_executor(
                self._codec_threads, check_page, blob, key.namespace_id, key.page_hash
            )
        except PageUnsupportedError:
            return False
        except KVStoreError:
            await source.discard_corrupt(key)
            return False
        return True

    def _note(self, key: PageKey, is_held: Sequence[bool]) -> None:
        """Remember a page that only tiers with a time to live have, if one below keeps pages."""
        lives = [tier.life_s(key) for tier in self._tiers]
        keepers = [place for place, life in enumerate(lives) if life is None]
        ends = [life for life, is_here in zip(lives, is_held, strict=True) if is_here and life]
        if not ends or any(is_held[place] for place in keepers) or not keepers:
            self._expiring.forget(key)
            return
        life = max(ends)
        margin = min(self._config.demote_before_s, life / 2)
        self._expiring.note(key, self._clock() + life - margin)

    async def _rescue(self, keys: Sequence[PageKey]) -> None:
        """Copy pages that are about to expire to the first tier that keeps pages.

        Being read for it, a page lives on once more where it is.
        """
        lasting = [tier for tier in self._tiers if tier.life_s(keys[0]) is None]
        target = next((tier for tier in lasting if tier.is_writable), None)
        if target is None:
            return
        held = await target.contains(keys)
        left = [key for key, is_held in zip(keys, held, strict=True) if not is_held]
        for source in self._tiers:
            if source not in lasting and left:
                copied = await self._copy_keys(left, source, target)
                left = [key for key in left if key not in copied]
