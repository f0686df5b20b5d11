"""Which replica holds the beginning of a prompt: a bounded map and what replicas report, no Ray."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from deployments.engine.prefixes import HeldPrefixes


class _Sent(NamedTuple):
    replica: str
    at: float


class PrefixAffinity:
    """Remembers the replica that last took each prompt prefix; the least used are forgotten.

    A replica that reports what it holds is believed more than this memory: it holds what it
    reports, and what was sent to it ``unconfirmed_s`` ago and is not in its report it has given up.
    """

    def __init__(
        self,
        capacity: int,
        *,
        unconfirmed_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty.

        Args:
            capacity: prefixes remembered, at most.
            unconfirmed_s: seconds after which a replica that reports should have reported a prefix
                that was sent to it.
            clock: seconds, monotonic.
        """
        self._capacity = capacity
        self._unconfirmed_s = unconfirmed_s
        self._clock = clock
        self._sent: OrderedDict[int, _Sent] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def record(self, names: Sequence[int], replica: str) -> None:
        """``replica`` takes a prompt with these prefixes."""
        sent = _Sent(replica, self._clock())
        for name in names:
            self._sent[name] = sent
            self._sent.move_to_end(name)
        while len(self._sent) > self._capacity:
            self._sent.popitem(last=False)

    def lookup(
        self, names: Sequence[int], replicas: Mapping[str, HeldPrefixes | None]
    ) -> tuple[str, ...]:
        """The replicas that hold the longest known prefix, the one that took it last first.

        Args:
            names: of a prompt's pages.
            replicas: those in question, with their reports.
        """
        for name in reversed(names):
            sent = self._sent.get(name)
            last = (
                sent.replica if sent is not None and self._is_likely(name, sent, replicas) else ""
            )
            holders = [
                replica
                for replica, held in replicas.items()
                if held is not None and held.holds(name) and replica != last
            ]
            if last or holders:
                return (last, *holders) if last else tuple(holders)
        return ()

    def _is_likely(
        self, name: int, sent: _Sent, replicas: Mapping[str, HeldPrefixes | None]
    ) -> bool:
        if sent.replica not in replicas:
            return False
        held = replicas[sent.replica]
        if held is None or not held.is_complete or held.holds(name):
            return True
        return self._clock() - sent.at < self._unconfirmed_s
