"""Who waits and who is next: strict priority first, then fairness between tenants.

Within a priority class every tenant has a virtual counter of the service it was given, in weighted
tokens, and the tenant with the least is next. A tenant that had nothing waiting is lifted to the
least counter of those that have: time away earns no credit. As long as anything waits something is
next, so fairness never leaves the engine idle. Of two tenants that always have something waiting
neither gets ahead by more than one prompt or what one full batch may write, whichever costs more.

Source: Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (virtual token
counters). Here a prompt costs what of it had to be computed.
"""

from __future__ import annotations

from bisect import insort
from itertools import zip_longest
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT_TOKEN_COST = 1
OUTPUT_TOKEN_COST = 4
"""A token of output costs a pass over the weights, shared by the batch; prompt tokens come by the
hundred in one pass. List prices of hosted models show the same order of magnitude."""


class Waiting(Protocol):
    """What the queue must know of a request."""

    @property
    def tenant(self) -> str:
        """Whose it is."""

    @property
    def priority(self) -> int:
        """Lower is more urgent."""

    @property
    def session_id(self) -> int:
        """Order of arrival."""


T = TypeVar("T", bound=Waiting)


class FairQueue(Generic[T]):
    """Waiting requests of all tenants. The caller bounds its length; see ``first_to_leave``.

    Counters are kept for every tenant that ever waited: as many as there are API keys' owners.
    """

    def __init__(self) -> None:
        self._classes: dict[int, _PriorityClass[T]] = {}
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[T]:
        """All that wait, in the order in which they should be tried.

        Tenants take turns, so that the first n show who is served next if all cost the same.
        """
        for priority in sorted(self._classes):
            yield from self._classes[priority]

    def push(self, item: T) -> None:
        """Let a newcomer wait behind those of its tenant."""
        self._class_of(item.priority).push(item)
        self._num_waiting += 1

    def put_back(self, item: T) -> None:
        """Let a request wait that was being served before: it goes before all newcomers."""
        insort(self._class_of(item.priority).returned, item, key=_arrival)
        self._num_waiting += 1

    def remove(self, item: T) -> bool:
        """Take a request out; False if it does not wait."""
        is_found = self._class_of(item.priority).remove(item)
        self._num_waiting -= is_found
        return is_found

    def charge(self, item: T, cost: int) -> None:
        """Count service given to a request's tenant."""
        self._class_of(item.priority).charge(item.tenant, cost)

    def first_to_leave(self, newcomer: T) -> T | None:
        """Who must leave a full queue so that ``newcomer`` may wait.

        Whoever waits in a less urgent class; else the tenant with the most waiting requests, if it
        would still have as many as the newcomer's. It loses its newest one, and never one that was
        being served before. One tenant may so fill the queue, but not against another.

        Returns:
            None if the newcomer itself is the one too many.
        """
        for priority in sorted(self._classes, reverse=True):
            if priority < newcomer.priority:
                break
            queues = self._classes[priority].queues
            longest = max(queues.values(), key=len, default=[])
            num_own = len(queues.get(newcomer.tenant, ()))
            if longest and (priority > newcomer.priority or len(longest) >= num_own + 2):
                return longest[-1]
        return None

    def _class_of(self, priority: int) -> _PriorityClass[T]:
        return self._classes.setdefault(priority, _PriorityClass())


class _PriorityClass(Generic[T]):
    """Requests of one priority.

    Attributes:
        returned: requests that were being served before, oldest first.
        queues: newcomers by tenant, oldest first; no entry is empty.
    """

    def __init__(self) -> None:
        self.returned: list[T] = []
        self.queues: dict[str, list[T]] = {}
        self._counters: dict[str, int] = {}
        self._virtual_time = 0

    def __iter__(self) -> Iterator[T]:
        yield from self.returned
        tenants = sorted(self.queues, key=self._counters.__getitem__)
        for turn in zip_longest(*(self.queues[tenant] for tenant in tenants)):
            yield from (item for item in turn if item is not None)

    def push(self, item: T) -> None:
        if item.tenant not in self.queues:
            self._pass_time()
            counter = self._counters.get(item.tenant, 0)
            self._counters[item.tenant] = max(counter, self._virtual_time)
            self.queues[item.tenant] = []
        self.queues[item.tenant].append(item)

    def remove(self, item: T) -> bool:
        queue = self.returned if item in self.returned else self.queues.get(item.tenant, [])
        if item not in queue:
            return False
        self._pass_time()
        queue.remove(item)
        if not queue:
            self.queues = {tenant: queue for tenant, queue in self.queues.items() if queue}
        return True

    def charge(self, tenant: str, cost: int) -> None:
        self._counters[tenant] = self._counters.get(tenant, self._virtual_time) + cost

    def _pass_time(self) -> None:
        """Remember the least counter of those that wait, for when nobody does."""
        waiting = (self._counters[tenant] for tenant in self.queues)
        self._virtual_time = max(self._virtual_time, min(waiting, default=self._virtual_time))


def _arrival(item: Waiting) -> int:
    return item.session_id
