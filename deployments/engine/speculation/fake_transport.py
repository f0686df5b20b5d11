"""A network in memory, as bad as you like, in virtual time.

Frames really are encoded and decoded. The same seed, faults and calls give the same run, and time
passes only by ``advance``, so tests and simulators explore hours of faults in a second. One thread.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

from google.protobuf.message import DecodeError

from deployments.engine.speculation.errors import HandshakeError
from deployments.engine.speculation.handshake import PROTOCOL_VERSION, check_hello
from deployments.engine.speculation.transport import (
    InT,
    OutT,
    Received,
    TargetTransport,
    Transport,
    TransportState,
)
from protos import draft_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.speculation.handshake import Identity
    from deployments.engine.speculation.transport import Connector, DraftTransport


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What happens to frames. Chances are per frame, times in seconds.

    Attributes:
        min_delay_s: from sending to arrival, at least.
        max_delay_s: at most, unless reordered.
        reorder: chance that a frame is held back, by up to four times ``max_delay_s``, and those
            behind it do not wait.
        truncate: chance that only a first part arrives; if that cannot be decoded the stream ends.
        kill: chance that a frame ends the stream instead of arriving.
    """

    min_delay_s: float = 0.0
    max_delay_s: float = 0.0
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    truncate: float = 0.0
    kill: float = 0.0


class FakeNetwork:
    """Endpoints, the streams between them, and the time.

    Args:
        capacity: frames under way per stream and direction; more are dropped.
    """

    def __init__(self, seed: int, faults: Faults | None = None, capacity: int = 64) -> None:
        self.faults = faults or Faults()
        self.capacity = capacity
        self.rng = random.Random(seed)  # noqa: S311 - reproducible on purpose
        self._now = 0.0
        self._listeners: dict[str, _Listener] = {}

    def clock(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds

    def delay_s(self) -> float:
        """How long the next frame travels."""
        return self.rng.uniform(self.faults.min_delay_s, self.faults.max_delay_s)

    def listen(
        self,
        endpoint: str,
        identity: Identity,
        accept: Callable[[DraftTransport], None],
        max_session_tokens: int,
    ) -> None:
        """Put a drafter behind an endpoint."""
        self._listeners[endpoint] = _Listener(identity, accept, max_session_tokens, [])

    def kill(self, endpoint: str) -> None:
        """The drafter dies: its streams end and nobody listens any more."""
        listener = self._listeners.pop(endpoint, None)
        for transport in listener.transports if listener is not None else ():
            transport.close()

    def connector(self, identity: Identity, target_id: str = "target") -> Connector:
        """How a target with this identity dials."""

        def connect(endpoint: str) -> TargetTransport:
            transport = _FakeTargetEnd(self)
            listener = self._listeners.get(endpoint)
            if listener is None:
                transport.close()
                return transport
            try:
                check_hello(listener.identity, identity.hello(target_id))
            except HandshakeError as error:
                transport.refuse(str(error))
                return transport
            draft_end: _FakeEnd[draft_pb2.DraftFrame, draft_pb2.TargetFrame] = _FakeEnd(
                self, draft_pb2.TargetFrame
            )
            transport.join(draft_end)
            transport.greet(listener.max_session_tokens)
            listener.transports = [kept for kept in listener.transports if kept.is_alive]
            listener.transports.append(draft_end)
            listener.accept(draft_end)
            return transport

        return connect


@dataclass(slots=True)
class _Listener:
    identity: Identity
    accept: Callable[[DraftTransport], None]
    max_session_tokens: int
    transports: list[DraftTransport]


class _FakeEnd(Transport[OutT, InT], Generic[OutT, InT]):
    def __init__(self, network: FakeNetwork, incoming: type[InT]) -> None:
        self._network = network
        self._incoming = incoming
        self._peer: _FakeEnd[InT, OutT] | None = None
        self._under_way: list[tuple[float, int, bytes]] = []
        self._last_arrival = 0.0
        self._num_sent = 0
        self._num_dropped = 0
        self._is_closed = False

    def join(self, peer: _FakeEnd[InT, OutT]) -> None:
        """Become the two ends of one stream."""
        self._peer = peer
        peer._peer = self

    def send(self, frame: OutT) -> bool:
        """Encode a frame and let fate have it."""
        peer = self._peer
        if not self.is_alive or peer is None:
            return False
        if len(peer._under_way) >= self._network.capacity:  # noqa: SLF001
            self._num_dropped += 1
            return False
        peer._post(frame.SerializeToString())  # noqa: SLF001
        return True

    def receive(self) -> list[Received[InT]]:
        """Decode what has arrived by now."""
        frames: list[Received[InT]] = []
        while self._under_way and self._under_way[0][0] <= self._network.clock():
            at, _, data = heapq.heappop(self._under_way)
            try:
                frames.append(Received(self._incoming.FromString(data), at))
            except DecodeError:
                self.close()
        return frames

    def close(self) -> None:
        """End the stream for both ends, at once."""
        for end in (self, self._peer):
            if end is not None:
                end._is_closed = True  # noqa: SLF001
                end._under_way.clear()  # noqa: SLF001

    @property
    def state(self) -> TransportState:
        """Where the stream is in its life."""
        return TransportState.CLOSED if self._is_closed else TransportState.OPEN

    @property
    def num_dropped(self) -> int:
        """Frames this end had no room for; those the network lost are nobody's."""
        return self._num_dropped

    def _post(self, data: bytes) -> None:
        rng, faults = self._network.rng, self._network.faults
        if rng.random() < faults.kill:
            self.close()
            return
        if rng.random() < faults.drop:
            return
        copies = 2 if rng.random() < faults.duplicate else 1
        if data and rng.random() < faults.truncate:
            data = data[: rng.randrange(len(data))]
        for _ in range(copies):
            arrival = self._network.clock() + self._network.delay_s()
            if rng.random() < faults.reorder:
                arrival += rng.uniform(0.0, 4.0 * faults.max_delay_s)
            else:
                arrival = self._last_arrival = max(arrival, self._last_arrival)
            self._num_sent += 1
            heapq.heappush(self._under_way, (arrival, self._num_sent, data))


class _FakeTargetEnd(_FakeEnd[draft_pb2.TargetFrame, draft_pb2.DraftFrame], TargetTransport):
    def __init__(self, network: FakeNetwork) -> None:
        super().__init__(network, draft_pb2.DraftFrame)
        self._welcome: draft_pb2.Welcome | None = None
        self._refusal: str | None = None
        self._open_at = 0.0

    def greet(self, max_session_tokens: int) -> None:
        """The welcome is on its way; a round trip from now the stream is open."""
        self._open_at = self._network.clock() + self._network.delay_s() + self._network.delay_s()
        self._welcome = draft_pb2.Welcome(
            protocol_version=PROTOCOL_VERSION, max_session_tokens=max_session_tokens
        )

    def refuse(self, reason: str) -> None:
        """The handshake failed."""
        self._refusal = reason
        self.close()

    @property
    def state(self) -> TransportState:
        """Where the stream is in its life."""
        if not self._is_closed and self._network.clock() < self._open_at:
            return TransportState.CONNECTING
        return super().state

    @property
    def welcome(self) -> draft_pb2.Welcome | None:
        """The drafter's answer to the hello."""
        return self._welcome

    @property
    def refusal(self) -> str | None:
        """Why the handshake failed."""
        return self._refusal
