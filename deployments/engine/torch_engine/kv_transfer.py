"""Pages between the pool and the KV tier, seen from the engine thread. Nothing here blocks.

Out: when a page fills with committed tokens it enters the prefix cache, and a copy is queued for
the tier. In: before a waiting sequence is admitted, the part of its prefix that the pool lacks is
asked for, and pages are lent for the tier to write to; what arrives in time becomes idle cached
pages, where admission finds it like any other. A lent page goes to whoever needs it and a waiting
sequence holds none, so a slow tier can delay a request but never starve another.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kv_store.keys import EXACT, Namespace
from kv_store.landing import Landing

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf
    from concurrent.futures import Future

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from deployments.engine.torch_engine.page_pool import Loan, PagePool
    from deployments.engine.torch_engine.sequence import Sequence
    from kv_store.keys import PageKey
    from kv_store.layout import PageLayout
    from kv_store.page_store import LoadedPages, PageStore

logger = logging.getLogger(__name__)

_GRACE_S = 0.5
"""How much longer than its own deadline the store is waited for."""


class PageMemory(Protocol):
    """The tensors behind page numbers and slots."""

    def read_page(self, page: int) -> NDArray[np.uint8]:
        """A copy of one page's raw bytes in the layout's order, [layout.nbytes]."""

    def page_rows(self, page: int) -> NDArray[np.uint8] | None:
        """One page's memory, [num_layers, 2, bytes of one layer's keys or values].

        None where other threads cannot write to it.
        """

    def write_page(self, page: int, raw: NDArray[np.uint8]) -> None:
        """Overwrite one page."""

    def copy_rows(self, src_slots: Tensor, dst_slots: Tensor) -> None:
        """Copy KV rows; all sources are read before any destination is written."""


@dataclass(slots=True)
class _Load:
    sequence: Sequence
    keys: list[PageKey]
    loans: list[Loan]
    num_local_pages: int
    future: Future[LoadedPages]
    gives_up_at: float
    followers: list[Sequence] = field(default_factory=list)


class KVTransfer:
    """Moves pages for the engine thread."""

    def __init__(
        self,
        pool: PagePool,
        memory: PageMemory,
        layout: PageLayout,
        store: PageStore | None,
        *,
        load_timeout_s: float,
        monotonic: Callable[[], float],
        wake: Callable[[], None],
    ) -> None:
        """Connect a pool to a store.

        Args:
            pool: page ownership.
            memory: the pages' bytes.
            layout: their shape.
            store: the KV tier, or None to keep pages in this replica only.
            load_timeout_s: a request waits for the tier no longer than about this.
            monotonic: the clock behind time-outs.
            wake: called from any thread when a load has ended.
        """
        self._pool = pool
        self._memory = memory
        self._layout = layout
        self._store = store
        self._load_timeout_s = load_timeout_s
        self._monotonic = monotonic
        self._wake = wake
        self._loads: list[_Load] = []
        self._fidelity = store.fidelity if store is not None else EXACT

    def namespace(self, tenant_key: bytes) -> Namespace:
        """Where a tenant's pages are named."""
        return Namespace(tenant_key, self._layout, self._fidelity)

    def page_keys(self, tenant_key: bytes, token_ids: SequenceOf[int]) -> list[PageKey]:
        """Names of the full pages of a text. From any thread."""
        return self.namespace(tenant_key).chain(token_ids)

    def num_local_pages(self, keys: SequenceOf[PageKey]) -> int:
        """Leading pages of a chain that are in the pool; a hint, as it may be from any thread."""
        return self._pool.count_prefix(keys)

    def begin_load(self, sequence: Sequence) -> None:
        """Ask the tier for the pages of a waiting sequence that the pool lacks.

        Does nothing if that was done before, or while as many pages are lent as there are.
        A sequence whose next page another one has asked for follows that load, and asks for the
        rest only if that load brings all it should.
        """
        if sequence.is_tier_asked or sequence.is_loading or self._store is None:
            return
        keys = sequence.reusable_keys
        num_local = self._pool.touch_prefix(keys)
        for load in self._loads:
            if keys[num_local:] and keys[num_local] in load.keys:
                load.followers.append(sequence)
                sequence.is_loading = True
                return
        # Room for what is missing, and the prefix found just now must not be evicted for it.
        num_room = self._pool.num_free - self._pool.num_lent - num_local
        missing = keys[num_local : num_local + max(0, num_room)]
        if keys[num_local:] and not missing and self._loads:
            return
        sequence.is_tier_asked = True
        if not missing:
            return
        loans = self._pool.lend(len(missing), self._landing)
        landings = [loan.landing for loan in loans if loan.landing is not None]
        future = self._store.load(
            missing,
            timeout_s=self._load_timeout_s,
            into=landings or None,
            traceparent=sequence.request.traceparent,
        )
        sequence.is_loading = True
        gives_up_at = self._monotonic() + self._load_timeout_s + _GRACE_S
        self._loads.append(_Load(sequence, missing, loans, num_local, future, gives_up_at))
        future.add_done_callback(lambda _: self._wake())

    def finish_loads(self) -> None:
        """Take in what has arrived, and give up on what has not in time."""
        now = self._monotonic()
        pending = []
        for load in self._loads:
            num_arrived = 0
            if load.future.done():
                num_arrived = self._num_arrived(load)
            elif now < load.gives_up_at:
                pending.append(load)
                continue
            else:
                logger.warning("the KV tier did not answer in time; computing the pages instead")
            self._take_in(load, num_arrived)
            load.sequence.is_loading = False
            for follower in load.followers:
                follower.is_loading = False
                follower.is_tier_asked = num_arrived < len(load.keys)
        self._loads = pending

    def forget(self, sequence: Sequence) -> None:
        """Stop waiting for a sequence that has ended."""
        for load in self._loads:
            if load.sequence is sequence:
                self._take_in(load, 0)
                for follower in load.followers:
                    follower.is_loading = False
        self._loads = [load for load in self._loads if load.sequence is not sequence]
        sequence.is_loading = False

    @property
    def gives_up_at(self) -> float | None:
        """When the next load times out, on the monotonic clock; None if none is under way."""
        return min((load.gives_up_at for load in self._loads), default=None)

    def publish(self, sequence: Sequence) -> None:
        """Cache the pages that a commit has filled, and queue copies for the tier."""
        num_full = sequence.num_computed_tokens // self._layout.page_tokens
        num_published = sequence.num_published_pages
        # For all but a prefill for others, what is published is in the tier or was let go there.
        num_tier = num_full if sequence.num_tier_pages is None else sequence.num_tier_pages
        if num_full <= min(num_published, num_tier):
            return
        sequence.extend_page_keys()
        for index in range(min(num_published, num_tier), num_full):
            page, key = sequence.page_table[index], sequence.page_keys[index]
            is_new = index >= num_published and self._pool.publish(page, key)
            if (is_new or index >= num_tier) and self._store is not None:
                self._store.save(
                    key,
                    self._memory.read_page(page),
                    traceparent=sequence.request.traceparent,
                )
        sequence.num_published_pages = max(num_published, num_full)
        if sequence.num_tier_pages is not None:
            sequence.num_tier_pages = max(num_tier, num_full)

    def _landing(self, page: int) -> Landing | None:
        rows = self._memory.page_rows(page)
        return Landing(rows) if rows is not None else None

    def _num_arrived(self, load: _Load) -> int:
        """How many pages at the head of what was asked for hold what they shall."""
        if (error := load.future.exception()) is not None:
            logger.warning("a KV load failed: %r", error)
            return 0
        num_arrived = 0
        for loan, data in zip(load.loans, load.future.result().pages, strict=False):
            if data.nbytes != self._layout.nbytes:
                logger.warning("a loaded page has %d bytes; it is not used", data.nbytes)
                break
            if loan.is_over:
                break
            if loan.landing is None:
                self._memory.write_page(loan.page, data)
            num_arrived += 1
        return num_arrived

    def _take_in(self, load: _Load, num_arrived: int) -> None:
        """End a load: what arrived becomes idle cached pages, the other pages are free."""
        # What was found in the pool is needed to reach what arrived: it stays as long.
        owned = self._pool.acquire_prefix(load.sequence.reusable_keys[: load.num_local_pages])
        for index, (key, loan) in enumerate(zip(load.keys, load.loans, strict=True)):
            if not self._pool.keep(loan):
                continue
            if index < num_arrived and not self._pool.publish(loan.page, key):
                owned += self._pool.acquire_prefix([key])  # somebody has computed it meanwhile
            owned.append(loan.page)
        self._pool.release(owned)
        load.sequence.first_loaded_page = load.num_local_pages
        load.sequence.num_loaded_pages = load.num_local_pages + num_arrived
