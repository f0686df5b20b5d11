"""Reused memory for blobs on their way from a tier to the decoder.

A fresh buffer of some megabytes costs more in page faults than its copy does. So buffers are kept:
one goes back by itself when the last view of it is gone.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import OrderedDict, deque

import numpy as np

_STEP = 64 << 10
_MAX_IDLE_BYTES = 256 << 20


class BufferPool:
    """Hands out page-aligned memory. Thread-safe.

    A view may die in any thread, and the collector may drop one inside ``take`` itself: so nobody
    waits for the lock on that way.
    """

    def __init__(self, max_idle_bytes: int = _MAX_IDLE_BYTES) -> None:
        """Start empty.

        Args:
            max_idle_bytes: of all sizes together, so much is kept while nobody uses it.
        """
        self._max_idle_bytes = max_idle_bytes
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()  # guards the two below
        self._idle: OrderedDict[int, list[mmap.mmap]] = OrderedDict()  # sizes used last at the end
        self._num_idle_bytes = 0

    def take(self, num_bytes: int) -> memoryview:
        """A writable buffer with the remains of former users in it."""
        size = max(1, -(-num_bytes // _STEP)) * _STEP
        with self._lock:
            memory = self._pop(size) if size in self._idle else None
        if memory is None:
            memory = mmap.mmap(-1, size)
        view = np.frombuffer(memory, dtype=np.uint8, count=num_bytes)
        weakref.finalize(view, self._give_back, memory).atexit = False
        return view.data

    def _give_back(self, memory: mmap.mmap) -> None:
        self._returned.append(memory)
        # Whoever has the lock now looks again after it, here or at the end of its own view.
        while self._returned and self._lock.acquire(blocking=False):
            try:
                while self._returned:
                    self._keep(self._returned.popleft())
            finally:
                self._lock.release()

    def _keep(self, memory: mmap.mmap) -> None:
        """With the lock; sizes that nobody has used for longest make room."""
        size = len(memory)
        self._idle.setdefault(size, []).append(memory)
        self._idle.move_to_end(size)
        self._num_idle_bytes += size
        while self._num_idle_bytes > self._max_idle_bytes:
            self._pop(next(iter(self._idle)))

    def _pop(self, size: int) -> mmap.mmap:
        """With the lock; one of a size that there is."""
        memories = self._idle[size]
        memory = memories.pop()
        if not memories:
            del self._idle[size]
        self._num_idle_bytes -= size
        return memory
