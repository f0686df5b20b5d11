"""From a chain of keys to verified pages: locate the longest prefix, fetch, verify, decode."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from kv_store.codecs.registry import readable_codecs
from kv_store.errors import KVStoreError, PageUnsupportedError
from kv_store.page_format import decode_page
from kv_store.spans import describe, kv_span
from kv_store.tiers.buffers import BufferPool

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from kv_store.codecs.base import Codec
    from kv_store.keys import PageKey
    from kv_store.landing import Landing
    from kv_store.layout import PageLayout
    from kv_store.single_flight import SingleFlight
    from kv_store.tiers.base import Blob
    from kv_store.tiers.guarded import GuardedTier

    _Outcome: TypeAlias = NDArray[np.uint8] | KVStoreError | None
    """A verified page, or why it will not do; None if there is none, or nobody wants it any more.
    """

logger = logging.getLogger(__name__)


class LoadedPage(NamedTuple):
    """A verified page and the tier it came from."""

    page: NDArray[np.uint8]
    tier: str


class _Found(NamedTuple):
    key: PageKey
    tier: GuardedTier
    landing: Landing | None

    @property
    def is_unwanted(self) -> bool:
        return self.landing is not None and self.landing.is_withdrawn


class ChainLoader:
    """Reads through the tiers, hot first. Lives on the store's event loop."""

    def __init__(
        self,
        *,
        tiers: Sequence[GuardedTier],
        layout: PageLayout,
        codec: Codec,
        codec_threads: Executor,
        num_codec_threads: int,
        batch_pages: int,
        single_flight: SingleFlight | None = None,
    ) -> None:
        """Wire up.

        Args:
            tiers: hot first.
            layout: of every page.
            codec: the one the store writes with; decides which pages may be served.
            codec_threads: verify and decode here, off the event loop.
            num_codec_threads: their number.
            batch_pages: pages asked of a tier in one operation.
            single_flight: waits for pages that another replica computes.
        """
        self._tiers = tiers
        self._layout = layout
        self._codecs = readable_codecs(codec)
        self._codec_threads = codec_threads
        self._num_codec_threads = num_codec_threads
        self._batch_pages = batch_pages
        self._single_flight = single_flight
        self._buffers = BufferPool()

    async def load(
        self,
        keys: Sequence[PageKey],
        loaded: list[LoadedPage],
        deadline: float,
        into: Sequence[Landing] | None = None,
    ) -> None:
        """Append the longest prefix that can be had, page by page, in order.

        Args:
            keys: consecutive keys of one chain.
            loaded: grows as pages are verified, so that a caller who gives up keeps what came.
            deadline: on the loop's clock; only divides the waiting among tiers, the caller stops.
            into: where each page goes, see ``PageStore.load``.
        """
        flight = self._single_flight
        gives_up_at = flight.gives_up_at(deadline) if flight else 0.0
        has_joined = False
        while rest := keys[len(loaded) :]:
            num_before = len(loaded)
            holders = await self._locate(rest, deadline)
            places = into[num_before:] if into is not None else [None] * len(holders)
            await self._take_in([*map(_Found, rest, holders, places)], loaded)
            if len(loaded) < num_before + len(holders):
                return
            rest = rest[len(holders) :]
            if not rest or not flight:
                return
            has_joined = await flight.wait_for_first(rest, gives_up_at, has_joined=has_joined)
            if not has_joined:
                return

    async def find(self, keys: Sequence[PageKey], deadline: float) -> int:
        """How long a prefix of the chain ``load`` would begin with.

        Args:
            keys: consecutive keys of one chain.
            deadline: see ``load``.
        """
        return len(await self._locate(keys, deadline))

    async def find_shared(self, keys: Sequence[PageKey]) -> int:
        """How long a prefix of the chain lies in tiers that all replicas reach."""
        tiers = [tier for tier in self._tiers if tier.is_shared]
        held = await asyncio.gather(*(tier.contains(keys) for tier in tiers))
        is_there = [any(each) for each in zip(*held, strict=True)]
        return is_there.index(False) if False in is_there else len(is_there)

    async def _take_in(self, found: Sequence[_Found], loaded: list[LoadedPage]) -> None:
        """Fetch and append what was located, up to the first page that does not come."""
        batches = [
            found[start : start + self._batch_pages]
            for start in range(0, len(found), self._batch_pages)
        ]
        fetch: asyncio.Task[list[Blob | None]] | None = None
        try:
            for number, batch in enumerate(batches):
                blobs = await (fetch or self._fetch(batch))
                # The next batch travels while this one is being decoded.
                following = batches[number + 1 : number + 2]
                fetch = asyncio.create_task(self._fetch(following[0])) if following else None
                verified = await self._verify(batch, blobs)
                for page in await asyncio.gather(*map(self._sound, batch, verified)):
                    if page is None:
                        return
                    loaded.append(page)
        finally:
            if fetch is not None:
                fetch.cancel()

    async def _locate(self, keys: Sequence[PageKey], deadline: float) -> list[GuardedTier]:
        """Who holds each page of the prefix in which somebody does; lower tiers fill the holes."""
        holders: list[GuardedTier | None] = [None] * len(keys)
        for tier in self._tiers:
            holes = [index for index, holder in enumerate(holders) if holder is None]
            if not holes:
                break
            # Half of what is left, so that a silent tier leaves time for the ones below it.
            patience_s = max(0.0, deadline - asyncio.get_running_loop().time()) / 2
            with kv_span("find", tier=tier.name, pages_asked=len(holes)) as span:
                present = await tier.contains([keys[hole] for hole in holes], patience_s=patience_s)
                describe(span, pages_found=present.count(True))
            tier.count_misses(present.count(False))
            for hole, is_present in zip(holes, present, strict=True):
                if is_present:
                    holders[hole] = tier
        found: list[GuardedTier] = []
        for holder in holders:
            if holder is None:
                break
            found.append(holder)
        return found

    async def _fetch(self, batch: Sequence[_Found]) -> list[Blob | None]:
        """One blob for each page of a batch, from all tiers at once."""
        blobs: list[Blob | None] = [None] * len(batch)

        async def fetch_from(tier: GuardedTier) -> None:
            indices = [index for index, item in enumerate(batch) if item.tier is tier]
            if not indices:
                return
            with kv_span("get", tier=tier.name, pages_asked=len(indices)) as span:
                answers = await tier.get([batch[index].key for index in indices])
                sizes = [len(blob) for blob in answers if blob is not None]
                describe(span, pages_found=len(sizes), bytes=sum(sizes))
            for index, blob in zip(indices, answers, strict=True):
                blobs[index] = blob

        await asyncio.gather(*map(fetch_from, self._tiers))
        return blobs

    async def _sound(self, item: _Found, page: LoadedPage | None) -> LoadedPage | None:
        """The verified page; if this tier's bytes will not do, another tier's."""
        for tier in self._tiers:
            if page is not None or item.is_unwanted:
                break
            if tier is not item.tier:
                blobs = await tier.get([item.key])
                [page] = await self._verify([item._replace(tier=tier)], blobs)
        return page

    async def _verify(
        self, batch: Sequence[_Found], blobs: Sequence[Blob | None]
    ) -> list[LoadedPage | None]:
        """Decode, or count why not. A corrupt page is deleted, one for other readers is left."""
        # Each thread has one part of the batch: page by page, the loop would wake for every one.
        loop, stride = asyncio.get_running_loop(), min(self._num_codec_threads, len(batch))
        parts = await asyncio.gather(
            *(
                loop.run_in_executor(
                    self._codec_threads, self._decode_some, batch[n::stride], blobs[n::stride]
                )
                for n in range(stride)
            )
        )
        outcomes = [parts[n % stride][n // stride] for n in range(len(batch))]
        return await asyncio.gather(*map(self._judge, batch, outcomes))

    async def _judge(self, item: _Found, outcome: _Outcome) -> LoadedPage | None:
        key, tier = item.key, item.tier
        if outcome is None:
            tier.count_misses(0 if item.is_unwanted else 1)
        elif isinstance(outcome, PageUnsupportedError):
            tier.count_misses(1)
            logger.debug("page %s in tier %s: %s", _short(key), tier.name, outcome)
        elif isinstance(outcome, KVStoreError):
            logger.warning("deleted page %s in tier %s: %s", _short(key), tier.name, outcome)
            await tier.discard_corrupt(key)
        else:
            tier.count_hit()
            return LoadedPage(outcome, tier.name)
        return None

    def _decode_some(self, items: Sequence[_Found], blobs: Sequence[Blob | None]) -> list[_Outcome]:
        """In a codec thread."""
        return [*map(self._decode, items, blobs)]

    def _decode(self, item: _Found, blob: Blob | None) -> _Outcome:
        if blob is None:
            return None

        def unpack(out: NDArray[np.uint8]) -> None:
            decode_page(blob, item.key, self._layout, self._codecs, out)

        try:
            if item.landing is not None:
                return item.landing.fill(unpack)
            page = np.frombuffer(self._buffers.take(self._layout.nbytes), dtype=np.uint8)
            unpack(page)
        except KVStoreError as exc:
            return exc
        return page


def _short(key: PageKey) -> str:
    return key.page_hash[:6].hex()
