"""What leaves a segment log when its budget is full, and what stays. Pure: no file, no clock.

Pages are written into one of two queues of segment files. New ones are on *probation*; those that
were read while they were there move to *main* when their file goes, and those that come back soon
after they had left are written there at once (their names are remembered). So what is read once
passes through half of the budget at most, and what is used stays; nothing has to be kept in order
of use, and space is freed a whole file at a time (after Yang et al., S3-FIFO, SOSP 2023).

A disk may have less room than the budget says, or others may fill it: then the budget is what fits,
for as long as that is so.

Two things differ from the paper, since reading a page renews all of its chain at once, and since a
move writes megabytes: a page stays only if it was read within the last three quarters of a budget
of writes, however often before; and of one file at most half moves, the last read first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kv_store.keys import PageKey

_PROBATION_SHARE = 0.5
_RECENT_SHARE = 0.75
_MOVED_SHARE = 0.5
_MAX_REMEMBERED = 1 << 17


class Queue(Enum):
    """Where a page is written."""

    PROBATION = "probation"
    MAIN = "main"


@dataclass(slots=True)
class _Segment:
    queue: Queue
    num_bytes: int = 0
    sizes: dict[PageKey, int] = field(default_factory=dict)


class ReclaimPolicy:
    """Counts what a log holds and decides what goes. Not thread-safe.

    The log tells what it wrote and what was read; whenever ``num_bytes`` would exceed the budget it
    writes the ``survivors`` of the ``victim`` anew, removes its file, and then ``forget``s it.

    Attributes:
        num_bytes: of all segments together.
        budget_bytes: their bound for now.
        segment_bytes: of one segment, for now; only a larger page has one of its own.
    """

    def __init__(self, *, budget_bytes: int, segment_bytes: int) -> None:
        """Begin empty.

        Args:
            budget_bytes: of all segments together.
            segment_bytes: of one.
        """
        self._max_budget_bytes = budget_bytes
        self._max_segment_bytes = segment_bytes
        self._resize(budget_bytes)
        self._segments: dict[int, _Segment] = {}  # in order of age
        self._where: dict[PageKey, int] = {}
        self._read_at: dict[PageKey, int] = {}
        self._remembered: OrderedDict[PageKey, int] = OrderedDict()  # left lately, with their size
        self._num_remembered_bytes = 0
        self._num_written = 0  # bytes ever: the clock
        self.num_bytes = 0

    @property
    def is_cramped(self) -> bool:
        """Whether the disk, and not the configured budget, is the bound."""
        return self.budget_bytes < self._max_budget_bytes

    def shrink(self) -> None:
        """The disk takes no more than it has."""
        self._resize(self._fitting(self.num_bytes))

    def grow(self, num_free: int) -> None:
        """The disk has so many bytes free, which may have been others' before."""
        self._resize(max(self.budget_bytes, self._fitting(self.num_bytes + num_free)))

    def queue_for(self, key: PageKey) -> Queue:
        """Where a new page belongs."""
        return Queue.MAIN if key in self._remembered else Queue.PROBATION

    def begin(self, segment: int, queue: Queue) -> None:
        """A segment was opened; the youngest of its queue."""
        self._segments[segment] = _Segment(queue)

    def written_bytes(self, segment: int) -> int:
        """Written to a segment so far."""
        return self._segments[segment].num_bytes

    def wrote(self, segment: int, key: PageKey, num_bytes: int) -> None:
        """A page was written, and is held there from now on.

        Args:
            segment: where.
            key: the page's.
            num_bytes: of its record.
        """
        place = self._segments[segment]
        place.num_bytes += num_bytes
        place.sizes[key] = num_bytes
        self.num_bytes += num_bytes
        self._num_written += num_bytes
        self._where[key] = segment
        self._num_remembered_bytes -= self._remembered.pop(key, 0)

    def read(self, key: PageKey) -> None:
        """A page was used."""
        if key in self._where:
            self._read_at[key] = self._num_written

    def deleted(self, key: PageKey) -> None:
        """A page is no longer held; its bytes stay until its segment goes."""
        self._where.pop(key, None)
        self._read_at.pop(key, None)

    def victim(self) -> int | None:
        """The segment that goes next: the oldest of the queue that has more than its share."""
        oldest: dict[Queue, int] = {}
        num_on_probation = 0
        for number, segment in self._segments.items():
            oldest.setdefault(segment.queue, number)
            if segment.queue is Queue.PROBATION:
                num_on_probation += segment.num_bytes
        first, second = Queue.PROBATION, Queue.MAIN
        if num_on_probation < int(self.budget_bytes * _PROBATION_SHARE):
            first, second = second, first
        return oldest.get(first, oldest.get(second))

    def survivors(self, segment: int) -> list[PageKey]:
        """Pages of a segment that shall be written to ``Queue.MAIN`` before it goes."""
        oldest = self._num_written - int(self.budget_bytes * _RECENT_SHARE)
        place = self._segments[segment]
        recent = [
            (self._read_at[key], key)
            for key in place.sizes
            if self._where.get(key) == segment and self._read_at.get(key, -1) >= oldest
        ]
        recent.sort(key=lambda item: -item[0])
        room = int(self.segment_bytes * _MOVED_SHARE)
        chosen: list[PageKey] = []
        for _, key in recent:
            if place.sizes[key] <= room:
                room -= place.sizes[key]
                chosen.append(key)
        return chosen

    def forget(self, segment: int) -> list[PageKey]:
        """A segment is gone; the pages that went with it."""
        place = self._segments.pop(segment)
        self.num_bytes -= place.num_bytes
        lost = [key for key in place.sizes if self._where.get(key) == segment]
        for key in lost:
            self.deleted(key)
            if place.queue is Queue.PROBATION:
                self._remember(key, place.sizes[key])
        return lost

    def _fitting(self, disk_bytes: int) -> int:
        """The budget on such a disk, which must also hold what moves before its old place goes."""
        moving_bytes = min(self._max_segment_bytes // 2, disk_bytes // 5)
        return min(self._max_budget_bytes, disk_bytes - moving_bytes)

    def _resize(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.segment_bytes = min(self._max_segment_bytes, budget_bytes // 2)

    def _remember(self, key: PageKey, num_bytes: int) -> None:
        self._remembered[key] = num_bytes
        self._num_remembered_bytes += num_bytes
        while (
            self._num_remembered_bytes > self.budget_bytes
            or len(self._remembered) > _MAX_REMEMBERED
        ):
            self._num_remembered_bytes -= self._remembered.popitem(last=False)[1]
