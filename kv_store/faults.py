"""A tier that misbehaves on purpose, the same way in every run: for tests and chaos drills."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from kv_store.errors import TierUnavailableError
from kv_store.tiers.base import Blob, KVTier, TierUsage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_store.keys import PageKey


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
    """

    seed: int = 0
    fail: float = 0.0
    delay: float = 0.0
    delay_s: float = 0.01
    drop: float = 0.0
    corrupt: float = 0.0
    truncate: float = 0.0


class FaultyTier(KVTier):
    """Wraps a tier and owns it."""

    def __init__(self, tier: KVTier, plan: FaultPlan) -> None:
        self.name = tier.name
        self._tier = tier
        self._plan = plan
        self._num_draws = 0

    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """See ``KVTier``."""
        await self._before()
        return await self._tier.contains_many(keys)

    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """See ``KVTier``."""
        await self._before()
        return [self._damage(blob) for blob in await self._tier.get_many(keys)]

    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """See ``KVTier``."""
        await self._before()
        is_kept = [not self._happens(self._plan.drop) for _ in items]
        kept = [item for item, keep in zip(items, is_kept, strict=True) if keep]
        held = iter(await self._tier.put_many(kept))
        return [next(held) if keep else True for keep in is_kept]

    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """See ``KVTier``."""
        await self._before()
        return await self._tier.delete_many(keys)

    async def aclose(self) -> None:
        """Close the wrapped tier."""
        await self._tier.aclose()

    def usage(self) -> TierUsage:
        """The wrapped tier's."""
        return self._tier.usage()

    async def _before(self) -> None:
        if self._happens(self._plan.delay):
            await asyncio.sleep(self._plan.delay_s)
        if self._happens(self._plan.fail):
            raise TierUnavailableError("a planned fault")

    def _damage(self, blob: Blob | None) -> Blob | None:
        if blob is None or self._happens(self._plan.drop):
            return None
        if blob and self._happens(self._plan.truncate):
            blob = blob[: self._draw(len(blob))]
        if blob and self._happens(self._plan.corrupt):
            flipped = bytearray(blob)
            bit = self._draw(8 * len(flipped))
            flipped[bit // 8] ^= 1 << bit % 8
            blob = bytes(flipped)
        return blob

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._draw(1 << 32) < probability * (1 << 32)

    def _draw(self, bound: int) -> int:
        """A number below ``bound`` that depends only on the seed and how many came before."""
        self._num_draws += 1
        return (
            xxhash.xxh3_64_intdigest(self._num_draws.to_bytes(8, "little"), self._plan.seed) % bound
        )
