"""The tier seam: opaque bytes by page key, asynchronous and in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_store.keys import PageKey

Blob = bytes | memoryview
"""What a tier stores; it never looks inside."""


class TierUsage(NamedTuple):
    """What a tier holds now; -1 where only a server knows.

    Attributes:
        num_served: pages given to other nodes since the start.
    """

    num_pages: int = -1
    num_bytes: int = -1
    num_served: int = 0


class KVTier(ABC):
    """Holds blobs. A page is immutable: a second put of a key the tier holds changes nothing.

    A tier may lose any blob at any time and never answers with bytes of another key. All methods
    run on one event loop and raise nothing but ``TierUnavailableError``; a miss is a value.
    """

    name: str
    """Short and unique within a store; appears in stats, spans and metrics."""

    @abstractmethod
    async def contains_many(self, keys: Sequence[PageKey]) -> list[bool]:
        """Whether each key is held, in order."""

    @abstractmethod
    async def get_many(self, keys: Sequence[PageKey]) -> list[Blob | None]:
        """Each key's blob, or None, in order."""

    @abstractmethod
    async def put_many(self, items: Sequence[tuple[PageKey, Blob]]) -> list[bool]:
        """Store what is not held yet.

        Returns:
            In order, whether the tier holds the key now; False for what it refused.
        """

    @abstractmethod
    async def delete_many(self, keys: Sequence[PageKey]) -> int:
        """Forget keys; the number that were held."""

    @abstractmethod
    async def aclose(self) -> None:
        """Release everything. Idempotent; later calls of other methods raise."""

    takes_pages: bool = True
    """Whether pages can be put here at all; others hold what was put elsewhere."""

    is_shared: bool = False
    """Whether other replicas see what is put here, so that ``claim_many`` means something."""

    async def claim_many(self, keys: Sequence[PageKey], duration_s: float) -> list[bool]:
        """Take the right to compute pages, for a while.

        Returns:
            In order, False where another store has taken it and its time is not over.
        """
        return [True] * len(keys)

    def start(self) -> None:  # noqa: B027 - most tiers do nothing of their own accord
        """Begin what the tier does of its own accord, on the event loop; once, before all else."""

    def life_s(self, key: PageKey) -> float | None:
        """Seconds that a page is kept after it was put or read; None if there is no such limit.

        Args:
            key: of the page.
        """
        return None

    def usage(self) -> TierUsage:
        """What the tier holds now, without any wait."""
        return TierUsage()

    async def delete_namespace(self, namespace_id: bytes) -> int:
        """Forget every page of a namespace; the number that were held, or 0 if it keeps none."""
        return 0
