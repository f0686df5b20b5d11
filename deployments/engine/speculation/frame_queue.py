"""A bounded queue between a thread that must not wait and one that may."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FrameQueue(Generic[T]):
    """First in, first out, until closed; what is queued when it closes is lost.

    Args:
        capacity: items held at most.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._num_dropped = 0

    @property
    def num_dropped(self) -> int:
        """Items refused for want of room, or pushed out by newer ones."""
        return self._num_dropped

    def put(self, item: T) -> bool:
        """Append if there is room; never waits.

        Returns:
            False if the item was dropped.
        """
        with self._changed:
            if self._is_closed or len(self._items) >= self._capacity:
                self._num_dropped += not self._is_closed
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def put_pushing_out(self, item: T) -> None:
        """Append; the oldest item makes room. Never waits."""
        with self._changed:
            if self._is_closed:
                return
            if len(self._items) >= self._capacity:
                self._items.popleft()
                self._num_dropped += 1
            self._items.append(item)
            self._changed.notify_all()

    def put_waiting(self, item: T) -> bool:
        """Append as soon as there is room.

        Returns:
            False if the queue was closed instead.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or len(self._items) < self._capacity)
            if self._is_closed:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def get(self, timeout_s: float | None = None) -> T | None:
        """Wait for the next item.

        Returns:
            None if the queue is closed or the time is up.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._items and not self._is_closed:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            if self._is_closed:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def drain(self) -> list[T]:
        """Take everything; never waits."""
        with self._changed:
            items = list(self._items)
            self._items.clear()
            self._changed.notify_all()
            return items

    def close(self) -> None:
        """Wake everyone; nothing more goes in or out."""
        with self._changed:
            self._is_closed = True
            self._items.clear()
            self._changed.notify_all()
