"""Tells how far a long stage is, how fast it goes, and when it will be done."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_PERIOD_S = 10.0


class Pace:
    """One stage in this process. What an earlier process did counts as done, not as speed."""

    def __init__(
        self,
        stage: str,
        total: int | None,
        progress: Callable[[str], None],
        *,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            stage: what is counted, such as ``answers``.
            total: of the whole stage; None where that is not known.
            progress: gets a short line every ten seconds at most, and one at the end.
            done: before this process began.
            clock: in seconds.
        """
        self._stage = stage
        self._total = total
        self._progress = progress
        self._done = done
        self._clock = clock
        self._num_new = 0
        self._num_tokens = 0
        self._started = self._told = clock()

    def advance(self, num_tokens: int, count: int = 1, note: str = "") -> None:
        """Some more are done.

        Args:
            num_tokens: that were computed for them.
            count: how many.
            note: what else a line should say.
        """
        self._done += count
        self._num_new += count
        self._num_tokens += num_tokens
        now = self._clock()
        is_last = self._done == self._total
        if not is_last and now - self._told < _PERIOD_S:
            return
        self._told = now
        elapsed = max(now - self._started, 1e-9)
        known = "" if self._total is None else f" of {self._total}"
        parts = [f"{self._stage}: {self._done}{known}"]
        if note:
            parts.append(note)
        parts.append(f"{self._num_tokens / elapsed:.0f} tokens/s")
        if self._total is not None and not is_last:
            left = elapsed / self._num_new * (self._total - self._done)
            parts.append(f"about {_duration(left)} left")
        self._progress(", ".join(parts))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
