"""One stream between a target and a drafter, as the two ends see it.

A transport lives once: CONNECTING -> OPEN -> CLOSED. Reconnecting means a new transport (and new
epochs for all its sessions), so no frame of an old stream can ever be taken for one of the new.
No method blocks; frames that find no room are dropped and counted, never waited for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import StrEnum
from typing import Generic, NamedTuple, TypeAlias, TypeVar

from google.protobuf.message import Message

from protos import draft_pb2

OutT = TypeVar("OutT", bound=Message)
InT = TypeVar("InT", bound=Message)


class TransportState(StrEnum):
    """Where a stream is in its life."""

    CONNECTING = "connecting"
    OPEN = "open"
    CLOSED = "closed"


class Received(NamedTuple, Generic[InT]):
    """A frame and when it came off the wire, in ``time.monotonic`` seconds."""

    frame: InT
    at: float


class Transport(ABC, Generic[OutT, InT]):
    """One end of one stream. Methods may be called from any thread; none of them blocks."""

    @abstractmethod
    def send(self, frame: OutT) -> bool:
        """Queue a frame; it must not be changed afterwards.

        Returns:
            False if it was dropped: the stream is not open or its queue is full.
        """

    @abstractmethod
    def receive(self) -> list[Received[InT]]:
        """Everything that arrived since the last call, in order of arrival."""

    @abstractmethod
    def close(self) -> None:
        """End the stream; the other end notices. Closing twice is harmless."""

    @property
    @abstractmethod
    def state(self) -> TransportState:
        """Where the stream is in its life."""

    @property
    @abstractmethod
    def num_dropped(self) -> int:
        """Frames this end dropped: sent ones without room, received ones nobody took in time."""

    @property
    def is_alive(self) -> bool:
        """Whether frames can be sent."""
        return self.state is TransportState.OPEN


class TargetTransport(Transport[draft_pb2.TargetFrame, draft_pb2.DraftFrame]):
    """The target's end. The handshake is over when it is OPEN; hello and welcome are not seen.

    Attributes:
        on_arrival: where a transport has a thread of its own that reads, it calls this from there
            for every frame, so that whoever owns the stream need not leave the work to its next
            ``receive``.
    """

    on_arrival: Callable[[], None] | None = None

    @property
    @abstractmethod
    def welcome(self) -> draft_pb2.Welcome | None:
        """What the drafter answered to the hello; None until then."""

    @property
    @abstractmethod
    def refusal(self) -> str | None:
        """Why the drafter refused this target for good; None if it did not."""


DraftTransport: TypeAlias = Transport[draft_pb2.DraftFrame, draft_pb2.TargetFrame]
"""The drafter's end, handed out after the handshake."""

Connector: TypeAlias = Callable[[str], TargetTransport]
"""Starts to connect to an endpoint ("host:port") and returns at once."""
