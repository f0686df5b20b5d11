"""Whose pages the thread loads that SGLang's storage backend is called from, for spans.

SGLang tells its storage backend the names of pages and not the request they are for; around that
call it knows the request's name.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAX_REMEMBERED = 4096

_current: ContextVar[str | None] = ContextVar("traceparent", default=None)


class PageOwners:
    """Trace contexts of the requests that may load pages; the oldest are forgotten. Thread-safe."""

    def __init__(self, max_remembered: int = _MAX_REMEMBERED) -> None:
        """Start empty."""
        self._max_remembered = max_remembered
        self._lock = threading.Lock()
        self._traceparents: OrderedDict[str, str] = OrderedDict()

    def remember(self, rid: str, traceparent: str) -> None:
        """A request whose pages may be loaded.

        Args:
            rid: SGLang's name for it.
            traceparent: W3C trace context that the loads lie below.
        """
        with self._lock:
            self._traceparents[rid] = traceparent
            while len(self._traceparents) > self._max_remembered:
                self._traceparents.popitem(last=False)

    @contextmanager
    def loading(self, rid: str) -> Iterator[None]:
        """Within, pages are loaded for this request; afterwards it is forgotten."""
        with self._lock:
            traceparent = self._traceparents.pop(rid, None)
        token = _current.set(traceparent)
        try:
            yield
        finally:
            _current.reset(token)


def current_traceparent() -> str | None:
    """Of the request whose pages this thread loads, if it is traced."""
    return _current.get()
