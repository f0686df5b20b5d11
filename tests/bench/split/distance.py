"""Draft replicas that seem farther away than they are."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from deployments.engine.speculation.transport import Received, TargetTransport, TransportState

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.speculation.transport import Connector
    from protos import draft_pb2


class Distance:
    """What a round trip takes besides what it takes.

    Attributes:
        round_trip_s: may be changed between two runs.
    """

    def __init__(self) -> None:
        self.round_trip_s = 0.0

    def to(self, connect: Connector) -> Connector:
        """A connector to where ``connect`` leads, but this far away."""
        return lambda endpoint: _FarTransport(connect(endpoint), lambda: self.round_trip_s)


class _FarTransport(TargetTransport):
    """The whole delay is put on the way back, where it cannot reorder what the drafter sees."""

    def __init__(self, inner: TargetTransport, round_trip_s: Callable[[], float]) -> None:
        self._inner = inner
        self._round_trip_s = round_trip_s
        self._under_way: deque[Received[draft_pb2.DraftFrame]] = deque()
        self.on_arrival: Callable[[], None] | None = None
        inner.on_arrival = self._on_arrival

    def send(self, frame: draft_pb2.TargetFrame) -> bool:
        return self._inner.send(frame)

    def receive(self) -> list[Received[draft_pb2.DraftFrame]]:
        delay_s, now = self._round_trip_s(), time.monotonic()
        self._under_way += self._inner.receive()
        arrived = []
        while self._under_way and self._under_way[0].at + delay_s <= now:
            frame, at = self._under_way.popleft()
            arrived.append(Received(frame, at + delay_s))
        return arrived

    def _on_arrival(self) -> None:
        """On the inner one's reader thread: what arrives is read when it seems to be here."""
        if self.on_arrival is None:
            return
        if delay_s := self._round_trip_s():
            timer = threading.Timer(delay_s, self.on_arrival)
            timer.daemon = True
            timer.start()
        else:
            self.on_arrival()

    def close(self) -> None:
        self._inner.close()

    @property
    def state(self) -> TransportState:
        return self._inner.state

    @property
    def num_dropped(self) -> int:
        return self._inner.num_dropped

    @property
    def welcome(self) -> draft_pb2.Welcome | None:
        return self._inner.welcome

    @property
    def refusal(self) -> str | None:
        return self._inner.refusal
