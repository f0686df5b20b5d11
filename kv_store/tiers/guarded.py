"""A tier behind deadlines, breakers and counters: whatever goes wrong there is a counted miss."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeVar

from kv_store.errors import TierBusyError, TierUnavailableError
from kv_store.page_store import TierStats

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from kv_store.keys import PageKey
    from kv_store.tiers.base import Blob, KVTier
    from kv_store.tiers.breaker import CircuitBreaker

logger = logging.getLogger(__name__)

T = TypeVar("T")


class GuardedTier:
    """The only place where a broken tier turns into misses. Lives on one event loop.

    An operation runs as its own task up to the tier's own time limit, even if the load that wanted
    it has given up: so a silent server is found out (its breaker opens) although callers wait less
    than the limit, and no connection is torn down in the middle of a reply. Reads and writes have
    a breaker each, since a full disk or server can still be read.
    """

    def __init__(
        self,
        tier: KVTier,
        *,
        operation_timeout_s: float,
        make_breaker: Callable[[], CircuitBreaker],
        max_inflight: int = 16,
    ) -> None:
        """Wrap.

        Args:
            tier: owned from here on; ``aclose`` closes it.
            operation_timeout_s: an operation that takes longer is a failure.
            make_breaker: called once for reads and once for writes.
            max_inflight: operations under way at once; more wait for their turn.
        """
        self.name = tier.name
        self.is_shared = tier.is_shared
        self._tier = tier
        self._timeout_s = operation_timeout_s
        self._reads = make_breaker()
        self._writes = make_breaker()
        self._slots = asyncio.Semaphore(max_inflight)
        self._tasks: set[asyncio.Task[object]] = set()
        self._known_bugs: set[type[Exception]] = set()
        self._num_hits = self._num_misses = self._num_puts = self._num_refused = 0
        self._num_corrupt = self._num_errors = self._num_promoted = self._num_demoted = 0

    @property
    def is_writable(self) -> bool:
        """Whether a put would be tried now."""
        return self._tier.takes_pages and not self._writes.is_blocking

    @property
    def takes_pages(self) -> bool:
        """See ``KVTier``."""
        return self._tier.takes_pages

    def start(self) -> None:
        """See ``KVTier``."""
        self._tier.start()

    def life_s(self, key: PageKey) -> float | None:
        """See ``KVTier``."""
        return self._tier.life_s(key)

    async def contains(
        self, keys: Sequence[PageKey], *, patience_s: float | None = None
    ) -> list[bool]:
        """Whether each key is held; all False if the tier fails or ``patience_s`` ends."""
        found = await self._run(lambda: self._tier.contains_many(keys), self._reads, patience_s)
        return [False] * len(keys) if found is None else found

    async def get(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """Each key's blob; all None if the tier fails. Unverified: count them afterwards."""
        blobs = await self._run(lambda: self._tier.get_many(keys), self._reads)
        return [None] * len(keys) if blobs is None else blobs

    async def put(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """Whether the tier holds each key now; all False if the tier fails."""
        held = await self._run(lambda: self._tier.put_many(items), self._writes)
        if held is None:
            return [False] * len(items)
        self._num_puts += held.count(True)
        self._num_refused += held.count(False)
        return held

    async def claim(self, keys: Sequence[PageKey], duration_s: float) -> list[bool]:
        """See ``KVTier.claim_many``; all True if the tier fails: nobody shall wait for it."""
        if not keys:
            return []
        claimed = await self._run(lambda: self._tier.claim_many(keys, duration_s), self._writes)
        return [True] * len(keys) if claimed is None else claimed

    async def discard_corrupt(self, key: PageKey) -> None:
        """Count a page that failed verification as a miss, and delete it."""
        self._num_corrupt += 1
        self._num_misses += 1
        await self._run(lambda: self._tier.delete_many([key]), self._writes)

    async def drop_namespace(self, namespace_id: bytes) -> int:
        """How many pages of a namespace were forgotten; none if the tier fails."""
        try:
            return await self._tier.delete_namespace(namespace_id)
        except Exception:
            self._num_errors += 1
            logger.warning("KV tier %s was not cleared", self.name, exc_info=True)
            return 0

    def count_hit(self) -> None:
        """A page of this tier was verified and served."""
        self._num_hits += 1

    def count_misses(self, num_pages: int) -> None:
        """Pages asked of this tier that it could not give."""
        self._num_misses += num_pages

    def count_moved(self, num_pages: int, *, is_up: bool) -> None:
        """Pages were copied here from another tier."""
        if is_up:
            self._num_promoted += num_pages
        else:
            self._num_demoted += num_pages

    def stats(self) -> TierStats:
        """A snapshot."""
        usage = self._tier.usage()
        return TierStats(
            name=self.name,
            num_pages=usage.num_pages,
            num_bytes=usage.num_bytes,
            num_hits=self._num_hits,
            num_misses=self._num_misses,
            num_puts=self._num_puts,
            num_refused=self._num_refused,
            num_served=usage.num_served,
            num_promoted=self._num_promoted,
            num_demoted=self._num_demoted,
            num_corrupt=self._num_corrupt,
            num_errors=self._num_errors,
            is_open=self._reads.is_closed,
        )

    async def aclose(self) -> None:
        """Cancel what is under way and close the tier."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._tier.aclose()

    async def _run(
        self,
        operation: Callable[[], Coroutine[object, object, T]],
        breaker: CircuitBreaker,
        patience_s: float | None = None,
    ) -> T | None:
        """The operation's result; None if it was not allowed, failed, or outlasted patience."""
        try:
            async with asyncio.timeout(patience_s):
                await self._slots.acquire()
                if not breaker.allow():
                    self._slots.release()
                    return None
                task = asyncio.create_task(self._attempt(operation, breaker))
                self._tasks.add(task)
                task.add_done_callback(self._finish)
                return await asyncio.shield(task)
        except TimeoutError:
            return None

    def _finish(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        self._slots.release()

    async def _attempt(
        self, operation: Callable[[], Coroutine[object, object, T]], breaker: CircuitBreaker
    ) -> T | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                result = await operation()
        except TierBusyError:
            self._num_errors += 1
            breaker.record_untried()
            return None
        except (TierUnavailableError, TimeoutError) as exc:
            self._failed(breaker, exc)
            return None
        except Exception as exc:
            if type(exc) not in self._known_bugs:  # once, as it may come with every request
                self._known_bugs.add(type(exc))
                logger.exception("KV tier %s broke its promise", self.name)
            self._failed(breaker, exc)
            return None
        except BaseException:
            breaker.record_failure()  # an allowed probe must always be answered for
            raise
        if not breaker.is_closed:
            logger.info("KV tier %s is back", self.name)
        breaker.record_success()
        return result

    def _failed(self, breaker: CircuitBreaker, exc: Exception) -> None:
        was_closed = breaker.is_closed
        breaker.record_failure()
        self._num_errors += 1
        if was_closed and not breaker.is_closed:
            reason = str(exc) or type(exc).__name__
            logger.warning("KV tier %s is out of service: %s", self.name, reason)
