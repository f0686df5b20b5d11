"""The bounded way in: commands from the event loop to the engine thread."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from deployments.engine.torch_engine.structure.constraint import Constraint
    from deployments.engine.types import GenerationRequest


class Submission(NamedTuple):
    """A request and what was prepared for it."""

    session_id: int
    request: GenerationRequest
    structure: Constraint | None = None


class Commands(NamedTuple):
    """What has been asked since the last look, oldest first."""

    requests: tuple[Submission, ...]
    aborted_ids: frozenset[int]
    is_closing: bool


class Mailbox:
    """Holds commands until the engine thread takes them. Thread-safe; only ``take`` waits.

    Aborts need no bound of their own: they name open requests, and those are bounded.
    """

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._changed = threading.Condition()
        self._requests: deque[Submission] = deque()
        self._aborted_ids: set[int] = set()
        self._is_woken = False
        self._is_closing = False

    def submit(self, submission: Submission) -> bool:
        """Hand over a request under a new id; False if too many are waiting to be taken."""
        with self._changed:
            if len(self._requests) >= self._max_requests:
                return False
            self._requests.append(submission)
            self._notify()
            return True

    def abort(self, session_id: int) -> None:
        """Ask for the end of an open request."""
        with self._changed:
            self._aborted_ids.add(session_id)
            self._notify()

    def wake(self) -> None:
        """End a wait in ``take``: something outside the mailbox has changed."""
        with self._changed:
            self._notify()

    def close(self) -> None:
        """Ask the engine thread to stop."""
        with self._changed:
            self._is_closing = True
            self._notify()

    def take(self, timeout_s: float | None) -> Commands:
        """Take everything; wait for a command or a wake-up, ``timeout_s`` at most (None: ever)."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_woken, timeout_s)
            self._is_woken = False
            requests = tuple(self._requests)
            aborted_ids = frozenset(self._aborted_ids)
            self._requests.clear()
            self._aborted_ids.clear()
            return Commands(requests, aborted_ids, self._is_closing)

    def _notify(self) -> None:
        self._is_woken = True
        self._changed.notify()
