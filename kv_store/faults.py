"""A tier that misbehaves on purpose, the same way in every run: for tests and chaos drills."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from kv_store.errors import TierUnavailableError
from kv_store.tiers.base import Blob, KVTier, TierUsage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_store.keys import PageKey

_NUM_REMEMBERED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """How often each fault happens, as probabilities; all zero changes nothing.

    Attributes:
        seed: the same seed and order of calls give the same faults.
        fail: an operation raises ``TierUnavailableError``.
        delay: an operation first waits ``delay_s``.
        drop: a put blob is lost although it is reported as held, or a held one is not found.
        corrupt: one bit of a blob that is read is flipped.
        truncate: the end of a blob that is read is missing.
        swap: a read gives the blob of another key.
        duplicate: a put blob is also stored under another key, which then holds the wrong page.
        lie: whether a key is held is answered with the opposite.
        full: a put stores the first part of its batch and then raises.
        read_only: a put or a deletion raises.
    """

    seed: int = 0
    fail: float = 0.0
    delay: float = 0.0
    delay_s: float = 0.01
    drop: float = 0.0
    corrupt: float = 0.0
    truncate: float = 0.0
    swap: float = 0.0
    duplicate: float = 0.0
    lie: float = 0.0
    full: float = 0.0
    read_only: float = 0.0


class FaultyTier(KVTier):
    """Wraps a tier and owns it.

    Attributes:
        plan: may be replaced at any time; a drill ends its faults so.
        num_operations: pages asked, put or deleted so far.
        num_faults: what has gone wrong so far.
    """

    def __init__(self, tier: KVTier, plan: FaultPlan) -> None:
        self.name = tier.name
        self.is_shared = tier.is_shared
        self.takes_pages = tier.takes_pages
        self.plan = plan
        self.num_operations = 0
        self.num_faults = 0
        self._tier = tier
        self._num_draws = 0
        self._seen: deque[tuple[PageKey, Blob]] = deque(maxlen=_NUM_REMEMBERED)

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``."""
        await self._before(len(keys))
        held = await self._tier.contains_many(keys)
        return [is_held != self._happens(self.plan.lie) for is_held in held]

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``."""
        await self._before(len(keys))
        blobs = await self._tier.get_many(keys)
        return [self._damage(key, blob) for key, blob in zip(keys, blobs, strict=True)]

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """See ``KVTier``."""
        await self._before(len(items))
        if self._happens(self.plan.read_only):
            raise TierUnavailableError("a planned fault: read-only")
        if self._happens(self.plan.full):
            await self._tier.put_many(items[: self._draw(len(items) + 1)])
            raise TierUnavailableError("a planned fault: full")
        for key, blob in items:
            if self._seen and self._happens(self.plan.duplicate):
                other, _ = self._seen[self._draw(len(self._seen))]
                if other != key:
                    await self._tier.delete_many([other])
                    await self._tier.put_many([(other, bytes(blob))])
            self._seen.append((key, bytes(blob)))
        is_kept = [not self._happens(self.plan.drop) for _ in items]
        kept = [item for item, keep in zip(items, is_kept, strict=True) if keep]
        held = iter(await self._tier.put_many(kept))
        return [next(held) if keep else True for keep in is_kept]

    async def delete_namespace(self, namespace_id: bytes) -> int:
        """See ``KVTier``."""
        await self._before(1)
        if self._happens(self.plan.read_only):
            raise TierUnavailableError("a planned fault: read-only")
        return await self._tier.delete_namespace(namespace_id)

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """See ``KVTier``."""
        await self._before(len(keys))
        if self._happens(self.plan.read_only):
            raise TierUnavailableError("a planned fault: read-only")
        return await self._tier.delete_many(keys)

    def start(self) -> None:
        """See ``KVTier``."""
        self._tier.start()

    async def aclose(self) -> None:
        """Close the wrapped tier."""
        await self._tier.aclose()

    async def claim_many(self, keys: Sequence[PageKey], duration_s: float) -> list[bool]:
        """See ``KVTier``."""
        await self._before(len(keys))
        return await self._tier.claim_many(keys, duration_s)

    def life_s(self, key: PageKey) -> float | None:
        """The wrapped tier's."""
        return self._tier.life_s(key)

    def usage(self) -> TierUsage:
        """The wrapped tier's."""
        return self._tier.usage()

    async def _before(self, num_pages: int) -> None:
        self.num_operations += num_pages
        if self._happens(self.plan.delay):
            await asyncio.sleep(self.plan.delay_s)
        if self._happens(self.plan.fail):
            raise TierUnavailableError("a planned fault")

    def _damage(self, key: PageKey, blob: Blob | None) -> Blob | None:
        if blob is None or self._happens(self.plan.drop):
            return None
        if self._seen and self._happens(self.plan.swap):
            _, blob = self._seen[self._draw(len(self._seen))]
        self._seen.append((key, bytes(blob)))
        if blob and self._happens(self.plan.truncate):
            blob = blob[: self._draw(len(blob))]
        if blob and self._happens(self.plan.corrupt):
            flipped = bytearray(blob)
            bit = self._draw(8 * len(flipped))
            flipped[bit // 8] ^= 1 << bit % 8
            blob = bytes(flipped)
        return blob

    def _happens(self, probability: float) -> bool:
        if probability <= 0 or self._draw(1 << 32) >= probability * (1 << 32):
            return False
        self.num_faults += 1
        return True

    def _draw(self, bound: int) -> int:
        """A number below ``bound`` that depends only on the seed and how many came before."""
        self._num_draws += 1
        return (
            xxhash.xxh3_64_intdigest(self._num_draws.to_bytes(8, "little"), self.plan.seed) % bound
        )
