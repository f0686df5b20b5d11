"""What an SSD folder of a given size would hold, without the disk: the log's policy, and LRU."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from kv_store.keys import PageKey
from kv_store.tiers.reclaim import Queue, ReclaimPolicy


class Cache(Protocol):
    """Holds names of equal size."""

    def read(self, name: int) -> bool:
        """Whether it is held; counts as use."""

    def write(self, name: int) -> None:
        """Take in what is not held; does not count as use."""


class Unbounded:
    """Never forgets: the bound of what any cache can give."""

    def __init__(self) -> None:
        self._names: set[int] = set()

    def read(self, name: int) -> bool:
        """See ``Cache``."""
        return name in self._names

    def write(self, name: int) -> None:
        """See ``Cache``."""
        self._names.add(name)


class LeastRecentlyUsed:
    """The classic; a log on a disk cannot have it, as it frees room one page at a time."""

    def __init__(self, num_names: int) -> None:
        self._num_names = num_names
        self._names: OrderedDict[int, None] = OrderedDict()

    def read(self, name: int) -> bool:
        """See ``Cache``."""
        if name not in self._names:
            return False
        self._names.move_to_end(name)
        return True

    def write(self, name: int) -> None:
        """See ``Cache``."""
        self._names.setdefault(name)
        while len(self._names) > self._num_names:
            self._names.popitem(last=False)


class SimulatedLog:
    """A segment log that writes nothing: ``ReclaimPolicy`` driven as ``SegmentLog`` drives it."""

    def __init__(self, num_names: int, num_segment_names: int) -> None:
        """Begin empty.

        Args:
            num_names: the budget.
            num_segment_names: of one file.
        """
        self._budget = num_names
        self._segment = num_segment_names
        self._policy = ReclaimPolicy(budget_bytes=num_names, segment_bytes=num_segment_names)
        self._active: dict[Queue, int] = {}
        self._names: set[PageKey] = set()
        self._next = 0
        self.num_writes = 0

    def read(self, name: int) -> bool:
        """See ``Cache``."""
        key = _key(name)
        if key not in self._names:
            return False
        self._policy.read(key)
        return True

    def write(self, name: int) -> None:
        """See ``Cache``."""
        key = _key(name)
        if key in self._names:
            return
        while self._policy.num_bytes + 1 > self._budget:
            self._reclaim()
        self._append(key, self._policy.queue_for(key))

    def holds(self, name: int) -> bool:
        """Whether it is held; does not count as use."""
        return _key(name) in self._names

    def _append(self, key: PageKey, queue: Queue) -> None:
        number = self._active.get(queue)
        if number is None or self._policy.written_bytes(number) >= self._segment:
            number = self._active[queue] = self._next
            self._next += 1
            self._policy.begin(number, queue)
        self._policy.wrote(number, key, 1)
        self._names.add(key)
        self.num_writes += 1

    def _reclaim(self) -> None:
        number = self._policy.victim()
        assert number is not None
        self._active = {queue: active for queue, active in self._active.items() if active != number}
        for key in self._policy.survivors(number):
            self._append(key, Queue.MAIN)
        self._names.difference_update(self._policy.forget(number))


def _key(name: int) -> PageKey:
    return PageKey(bytes(16), name.to_bytes(32, "little"), 0)
