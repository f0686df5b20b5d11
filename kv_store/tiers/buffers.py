"""Reused memory for blobs on their way from a tier to the decoder.

A fresh buffer of some megabytes costs more in page faults than its copy does. So buffers are kept:
one goes back by itself when the last view of it is gone.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import numpy as np

_STEP = 64 << 10
_MAX_IDLE_BYTES = 256 << 20


class BufferPool:
    """Hands out page-aligned memory. Thread-safe without a lock, since views may die in any thread.

    A lock would not do: the collector may drop a view inside ``take`` itself.
    """

    def __init__(self, max_idle_bytes: int = _MAX_IDLE_BYTES) -> None:
        """Start empty.

        Args:
            max_idle_bytes: of each size, so much is kept while nobody uses it.
        """
        self._max_idle_bytes = max_idle_bytes
        self._idle: dict[int, deque[mmap.mmap]] = {}

    def take(self, num_bytes: int) -> memoryview:
        """A writable buffer with the remains of former users in it."""
        size = max(1, -(-num_bytes // _STEP)) * _STEP
        idle = self._idle.setdefault(size, deque())
        try:
            memory = idle.pop()
        except IndexError:
            memory = mmap.mmap(-1, size)
        view = np.frombuffer(memory, dtype=np.uint8, count=num_bytes)
        weakref.finalize(view, self._give_back, memory, idle).atexit = False
        return view.data

    def _give_back(self, memory: mmap.mmap, idle: deque[mmap.mmap]) -> None:
        if (len(idle) + 1) * len(memory) <= self._max_idle_bytes:
            idle.append(memory)
