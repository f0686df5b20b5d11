"""A circuit breaker: after repeated failures, stop asking for a while, then ask once.

closed -> (N consecutive failures) -> open -> (wait, with jitter) -> half open, one probe
half open -> success -> closed;  half open -> failure -> open, for twice as long up to a bound
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class CircuitBreaker:
    """Decides whether an operation may be tried. Not thread-safe: one event loop owns it."""

    def __init__(
        self,
        *,
        max_failures: int,
        open_s: float,
        max_open_s: float,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Start closed.

        Args:
            max_failures: consecutive failures that open it.
            open_s: seconds until the first probe; doubled after each failed one.
            max_open_s: bound of that doubling.
            clock: monotonic seconds.
            jitter: uniform in [0, 1); stretches each wait by up to half, so that the replicas of a
                pool do not probe a recovering server in the same instant.
        """
        self._max_failures = max_failures
        self._open_s = open_s
        self._max_open_s = max_open_s
        self._clock = clock
        self._jitter = jitter
        self._num_failures = 0
        self._next_open_s = open_s
        self._probe_at: float | None = None
        self._is_probing = False

    @property
    def is_closed(self) -> bool:
        """Whether operations pass freely."""
        return self._probe_at is None

    @property
    def is_blocking(self) -> bool:
        """Whether ``allow`` would say no now."""
        if self._probe_at is None:
            return False
        return self._is_probing or self._clock() < self._probe_at

    def allow(self) -> bool:
        """Whether to try now. After True, report exactly one of the three below."""
        if self.is_blocking:
            return False
        self._is_probing = self._probe_at is not None
        return True

    def record_success(self) -> None:
        """The operation worked: close."""
        self._num_failures = 0
        self._next_open_s = self._open_s
        self._probe_at = None
        self._is_probing = False

    def record_failure(self) -> None:
        """The operation failed or timed out."""
        self._num_failures += 1
        if self._probe_at is not None and not self._is_probing:
            return  # a straggler from before it opened says nothing new
        if self._is_probing or self._num_failures >= self._max_failures:
            self._probe_at = self._clock() + self._next_open_s * (1 + self._jitter() / 2)
            self._next_open_s = min(self._next_open_s * 2, self._max_open_s)
            self._is_probing = False

    def record_untried(self) -> None:
        """The operation never began, and nothing was learned: another may probe."""
        self._is_probing = False
