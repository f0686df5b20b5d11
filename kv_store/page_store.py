"""The seam between an engine and the KV tier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray

    from kv_store.keys import PageKey
    from kv_store.landing import Landing


@dataclass(frozen=True, slots=True)
class LoadedPages:
    """The longest prefix of the asked keys that could be had.

    Attributes:
        pages: raw page bytes, each [layout.nbytes] uint8, in key order; a landing's rows where the
            page was to land there.
        tiers: the name of the tier each page came from.
    """

    pages: tuple[NDArray[np.uint8], ...]
    tiers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """Counters of one tier since the start; ``num_pages`` and ``num_bytes`` are what it holds now.

    Attributes:
        num_pages: -1 where only the server knows (ask it through ``paceline kv``).
        num_refused: pages that it would not take: too large, or over a tenant's quota.
        num_served: pages of this node's folder that other nodes got.
        num_promoted: pages copied here from a lower tier, behind requests' backs.
        num_demoted: likewise, from a tier above.
        is_open: whether the breaker lets requests through.
    """

    name: str
    num_pages: int = -1
    num_bytes: int = -1
    num_hits: int = 0
    num_misses: int = 0
    num_puts: int = 0
    num_refused: int = 0
    num_served: int = 0
    num_promoted: int = 0
    num_demoted: int = 0
    num_corrupt: int = 0
    num_errors: int = 0
    is_open: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class PageStoreStats:
    """A snapshot of the store; counters count pages since the start.

    Attributes:
        num_dropped: pages not written because the write-back queue was full.
        num_queued: pages waiting to be written.
        num_failed: pages taken from the queue that no tier accepted.
        num_loads_refused: loads answered empty at once because too many were pending.
        num_flights_joined: times that a load got a page because it waited for another replica.
        num_flights_in_vain: times that it waited, or would have had to, and computes itself.
        num_moves_dropped: served pages that were not looked up in other tiers, as too many waited.
    """

    num_loaded: int = 0
    num_saved: int = 0
    num_dropped: int = 0
    num_queued: int = 0
    num_failed: int = 0
    num_loads_refused: int = 0
    num_moves_dropped: int = 0
    num_flights_joined: int = 0
    num_flights_in_vain: int = 0
    tiers: Mapping[str, TierStats] = field(default_factory=dict)


class PageStore(ABC):
    """Loads and saves pages without ever blocking the caller. Thread-safe."""

    @property
    @abstractmethod
    def fidelity(self) -> str:
        """``kv_store.keys.EXACT`` or ``lossy:<gate>``: the fidelity every key must be made with."""

    @abstractmethod
    def find(self, keys: Sequence[PageKey], *, timeout_s: float) -> Future[int]:
        """How many pages at the head of a chain some tier says it has. Never raises: see ``load``.

        Nothing is read, so what is found may still turn out to be a miss.

        Args:
            keys: consecutive keys of one chain.
            timeout_s: nothing is found if it takes longer.
        """

    @abstractmethod
    def load(
        self,
        keys: Sequence[PageKey],
        *,
        timeout_s: float,
        into: Sequence[Landing] | None = None,
        traceparent: str | None = None,
    ) -> Future[LoadedPages]:
        """Fetch the longest prefix of a chain. Never raises through the future: a miss is a value.

        Args:
            keys: consecutive keys of one chain.
            timeout_s: what has not arrived by then is a miss.
            into: where each key's page goes, instead of memory of the store's own. After the answer
                writes may still go on; they end with ``Landing.withdraw``.
            traceparent: W3C trace context of the request the pages are for.
        """

    @abstractmethod
    def save(
        self, key: PageKey, page: NDArray[np.uint8], *, traceparent: str | None = None
    ) -> bool:
        """Queue one page for writing; the store owns ``page`` from here on.

        Args:
            key: the page's name.
            page: [layout.nbytes] uint8.
            traceparent: W3C trace context of the request that computed it.

        Returns:
            False if the queue was full and the page was dropped (and counted).
        """

    @abstractmethod
    def settle(self, keys: Sequence[PageKey], *, timeout_s: float) -> Future[int]:
        """Wait until what is queued of a chain is written. Never raises: see ``load``.

        Args:
            keys: consecutive keys of one chain.
            timeout_s: what is not written shortly before its end does not count.

        Returns:
            How many pages at the chain's head other replicas find in a tier that all share.
        """

    @abstractmethod
    def stats(self) -> PageStoreStats:
        """A snapshot."""

    @abstractmethod
    def wait_until_written(self, timeout_s: float) -> bool:
        """Wait until every queued page was written or given up: the queue has all its room.

        Returns:
            False on time-out.
        """

    @abstractmethod
    def flush(self, timeout_s: float) -> bool:
        """Wait until every queued page was written or dropped, and those served were looked after.

        Returns:
            False on time-out.
        """

    @abstractmethod
    def clear(self, namespace_id: bytes, *, timeout_s: float) -> Future[int]:
        """Forget a namespace's pages in every tier, also those of other replicas. Never raises.

        Args:
            namespace_id: of the keys.
            timeout_s: it may end half done.

        Returns:
            How many pages were forgotten; one that was in two tiers counts twice.
        """

    @abstractmethod
    def close(self) -> None:
        """Flush briefly, stop threads, close tiers. Idempotent."""
