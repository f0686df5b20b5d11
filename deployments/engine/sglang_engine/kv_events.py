"""Reads the KV events that SGLang's scheduler publishes, and asks again for those that were lost.

Both sockets lie in a folder that only this user can enter. SGLang numbers its batches of events
from 0 and keeps the last of them; a batch that is not among those any more is lost for good.
"""

from __future__ import annotations

import json
import logging
import threading
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deployments.engine.sglang_engine.held_pages import HeldPages

logger = logging.getLogger(__name__)

_BUFFERED_BATCHES = 1000
"""No more than ZeroMQ queues for one who asks; it drops the rest without a word."""
_WAIT_S = 0.5
_QUIET_S = 10.0
"""Without an event, after which the reader asks whether it missed the last one."""
_REPLAY_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 15.0
_END = (-1).to_bytes(8, "big", signed=True)


class Batch(NamedTuple):
    """Events that were published together.

    Attributes:
        number: of the batch, from 0.
        events: see ``HeldPages.apply``.
    """

    number: int
    events: list[dict[str, Any]]


class EventSource(Protocol):
    """Where batches come from; used from one thread."""

    def receive(self, timeout_s: float) -> Batch | None:
        """The next batch, or None if none comes in time."""

    def replay(self, first: int) -> list[Batch] | None:
        """What is still kept of the batches from ``first`` on; None if nobody answers."""

    def close(self) -> None:
        """Give the sockets back."""


def publisher_settings(folder: Path) -> str:
    """SGLang's ``kv_events_config`` for a publisher that ``connect`` reaches."""
    return json.dumps(
        {
            "publisher": "zmq",
            "endpoint": _events_address(folder),
            "replay_endpoint": _replay_address(folder),
            "buffer_steps": _BUFFERED_BATCHES,
        }
    )


class EventReader:
    """Keeps ``HeldPages`` up to date, on a thread of its own, until closed."""

    def __init__(self, connect: Callable[[], EventSource], held: HeldPages) -> None:
        """Start.

        Args:
            connect: opens the source; called on the reader's thread.
            held: told of every event.
        """
        self._connect = connect
        self._held = held
        self._next = 0
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop. Idempotent."""
        self._is_closing.set()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        try:
            with closing(self._connect()) as source:
                self._read(source)
        except Exception:
            # Whatever it was, what the replica holds is not known any more; it serves on.
            logger.exception("KV events are not read any more")
            self._held.lost()

    def _read(self, source: EventSource) -> None:
        quiet_s = 0.0
        while not self._is_closing.is_set():
            batch = source.receive(_WAIT_S)
            quiet_s = 0.0 if batch is not None else quiet_s + _WAIT_S
            if quiet_s >= _QUIET_S or (batch is not None and batch.number > self._next):
                quiet_s = 0.0
                for missed in source.replay(self._next) or ():
                    self._take(missed)
            if batch is not None:
                self._take(batch)

    def _take(self, batch: Batch) -> None:
        if batch.number < self._next:
            return
        if batch.number > self._next:
            logger.warning("KV events %d to %d are lost", self._next, batch.number - 1)
            self._held.lost()
        self._next = batch.number + 1
        self._held.apply(batch.events)


def connect(folder: Path) -> EventSource:
    """The source of a SGLang that was given ``publisher_settings`` of this folder."""
    return _Sockets(_events_address(folder), _replay_address(folder))


class _Sockets:
    def __init__(self, events: str, replay: str) -> None:
        # Dependencies of SGLang's; the cluster's own environment does without.
        import msgspec
        import zmq

        self._zmq = zmq
        self._decode = msgspec.msgpack.decode
        self._context = zmq.Context()
        self._replay_address = replay
        self._events = self._context.socket(zmq.SUB)
        self._events.setsockopt(zmq.SUBSCRIBE, b"")
        self._events.connect(events)

    def receive(self, timeout_s: float) -> Batch | None:
        if not self._events.poll(timeout_s * 1000):
            return None
        _, number, payload = self._events.recv_multipart()
        return self._batch(number, payload)

    def replay(self, first: int) -> list[Batch] | None:
        # A socket for each question: nothing of an answer that came too late can stay behind.
        with self._context.socket(self._zmq.DEALER) as asking:
            asking.setsockopt(self._zmq.LINGER, 0)
            asking.connect(self._replay_address)
            asking.send_multipart((b"", first.to_bytes(8, "big")))
            batches: list[Batch] = []
            while asking.poll(_REPLAY_TIMEOUT_S * 1000):
                *_, number, payload = asking.recv_multipart()
                if number == _END:
                    return batches
                batches.append(self._batch(number, payload))
        return None

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _batch(self, number: bytes, payload: bytes) -> Batch:
        _, events, *_ = self._decode(payload)
        return Batch(int.from_bytes(number, "big"), events)


def _events_address(folder: Path) -> str:
    return f"ipc://{folder}/kv-events"


def _replay_address(folder: Path) -> str:
    return f"ipc://{folder}/kv-replay"
