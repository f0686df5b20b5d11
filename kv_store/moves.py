"""Which pages are worth a copy in another tier. Pure: no tier, no clock.

A copy is bytes as they are: no codec sees them, so a lossy page never loses twice on its way, and a
page is the same in every tier that has it.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kv_store.keys import PageKey


class ReadCounts:
    """How often pages were served; those not served for longest are forgotten."""

    def __init__(self, max_pages: int) -> None:
        self._max_pages = max_pages
        self._counts: OrderedDict[PageKey, int] = OrderedDict()

    def add(self, key: PageKey) -> int:
        """One more; the number so far."""
        count = self._counts.pop(key, 0) + 1
        self._counts[key] = count
        if len(self._counts) > self._max_pages:
            self._counts.popitem(last=False)
        return count


def worth_copying(
    keys: Sequence[PageKey],
    counts: Sequence[int],
    is_held: Sequence[bool],
    *,
    min_reads: int,
    head_pages: int,
) -> list[int]:
    """Pages of a served chain that a tier should get.

    Those that were read often enough; heads of chains, which many prompts share; and holes, since
    all pages that the tier holds behind one are useless without it.

    Args:
        keys: the chain, in order.
        counts: how often each was served.
        is_held: whether the tier has it.
        min_reads: how often is enough.
        head_pages: as many pages are a chain's head.

    Returns:
        Indices, ascending.
    """
    last_held = max((index for index, held in enumerate(is_held) if held), default=-1)
    return [
        index
        for index, key in enumerate(keys)
        if not is_held[index]
        and (counts[index] >= min_reads or key.index < head_pages or index < last_held)
    ]


class ExpiringPages:
    """Pages that will leave the only tier that has them, and when; bounded."""

    def __init__(self, max_pages: int) -> None:
        self._max_pages = max_pages
        self._due: dict[PageKey, float] = {}
        self._heap: list[tuple[float, PageKey]] = []

    def note(self, key: PageKey, due: float) -> None:
        """A page is due then; it replaces what was known. Beyond the bound nothing is noted."""
        if key not in self._due:
            if len(self._due) >= self._max_pages:
                return
            self._push(due, key)
        self._due[key] = due

    def forget(self, key: PageKey) -> None:
        """Another tier has it."""
        self._due.pop(key, None)

    @property
    def next_due(self) -> float | None:
        """When ``take`` may have something to give."""
        return self._heap[0][0] if self._heap else None

    def take(self, now: float, max_pages: int) -> list[PageKey]:
        """Pages that are due, and no longer noted."""
        taken: list[PageKey] = []
        while self._heap and self._heap[0][0] <= now and len(taken) < max_pages:
            _, key = heapq.heappop(self._heap)
            due = self._due.get(key)
            if due is None:  # forgotten
                continue
            if due > now:  # it was read meanwhile
                self._push(due, key)
            else:
                del self._due[key]
                taken.append(key)
        return taken

    def _push(self, due: float, key: PageKey) -> None:
        if len(self._heap) >= 2 * self._max_pages:  # most of it was forgotten
            self._heap = [(known, page) for page, known in self._due.items()]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (due, key))
