"""The socket between a replica's actor and its SGLang's scheduler.

The actor holds the draft sessions, because only it can ask Serve for draft replicas. It tells the
scheduler which replica drafts for which request; the scheduler talks to that one itself, and tells
the actor which streams it lost and what it counted. One line of JSON per message; nobody but this
user can reach the socket.
"""

from __future__ import annotations

import json
import logging
import queue
import socket
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import SecretStr

from deployments.engine.config import SpeculationConfig
from deployments.engine.speculation.handshake import Identity
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.speculation.speculator_stats import SpeculatorStats

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_MAX_QUEUED = 16_384
_CONNECT_TIMEOUT_S = 60.0


class DraftSettings(NamedTuple):
    """What the scheduler's end of the draft streams is made from."""

    speculation: SpeculationConfig
    identity: Identity
    replica_id: str
    secret: SecretStr

    def to_json(self) -> dict[str, Any]:
        """As one message."""
        return {
            "speculation": self.speculation.model_dump(mode="json"),
            "identity": asdict(self.identity),
            "replica_id": self.replica_id,
            "secret": self.secret.get_secret_value(),
        }

    @classmethod
    def from_json(cls, message: dict[str, Any]) -> DraftSettings:
        """The other way."""
        return cls(
            SpeculationConfig.model_validate(message["speculation"]),
            Identity(**message["identity"]),
            message["replica_id"],
            SecretStr(message["secret"]),
        )


class DraftLink(NoSpeculation):
    """The actor's end. What speculates sits in the scheduler; here nothing is ever drafted.

    ``attach`` and ``detach`` may be called from an event loop: they never wait.

    Attributes:
        address: of the socket, for ``connect``.
    """

    def __init__(self, settings: DraftSettings, on_link_lost: Callable[[str], None]) -> None:
        """Listen; the scheduler connects when it starts.

        Args:
            settings: handed to it.
            on_link_lost: see ``SplitSpeculator``.
        """
        self.settings = settings
        self._on_link_lost = on_link_lost
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-drafts-")
        self.address = str(Path(self._folder.name) / "socket")
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(self.address)
        self._server.listen(1)
        self._outgoing: queue.Queue[dict[str, Any] | None] = queue.Queue(_MAX_QUEUED)
        self._outgoing.put(settings.to_json())
        self._stats = SpeculatorStats()
        self._connection: socket.socket | None = None
        self._is_shut_down = False
        self._is_over = False
        self._thread = threading.Thread(target=self._serve, name="draft-link", daemon=True)
        self._thread.start()

    def attach(self, request_id: str, endpoint: str) -> None:
        """Have a request served by the draft replica at ``endpoint`` ("host:port")."""
        self._tell({"attach": request_id, "endpoint": endpoint})

    def detach(self, request_id: str) -> None:
        """The draft replica chosen for the request is given back."""
        self._tell({"detach": request_id})

    def stats(self) -> SpeculatorStats:
        """What the scheduler told last."""
        return self._stats

    def shutdown(self) -> None:
        """See ``Speculator.shutdown``. Idempotent."""
        if self._is_shut_down:
            return
        self._is_shut_down = self._is_over = True
        self._tell(None)
        # Wakes the thread where it waits for a scheduler, or for one to read.
        for end in (self._server, self._connection):
            if end is not None:
                _shut(end)
        self._thread.join()
        self._server.close()
        self._folder.cleanup()

    def _tell(self, message: dict[str, Any] | None) -> None:
        if self._is_over and message is not None:
            return
        try:
            self._outgoing.put_nowait(message)
        except queue.Full:
            # The scheduler does not read; whoever it concerns goes on with the drafter it has.
            logger.warning("too many messages wait for the scheduler; one is dropped")

    def _serve(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError:  # shut down before a scheduler came
            return
        self._connection = connection
        listening = threading.Thread(
            target=self._listen, args=(connection,), name="draft-link-reader", daemon=True
        )
        listening.start()
        try:
            while not self._is_shut_down and (message := self._outgoing.get()) is not None:
                send(connection, message)
        except OSError:
            logger.info("the scheduler has left its socket")
        self._is_over = True
        _shut(connection)
        listening.join()
        connection.close()

    def _listen(self, connection: socket.socket) -> None:
        try:
            with connection.makefile("r", encoding="utf-8") as lines:
                for line in lines:
                    message = json.loads(line)
                    if "lost" in message:
                        self._on_link_lost(message["lost"])
                    if "stats" in message:
                        self._stats = SpeculatorStats(**message["stats"])
        except OSError:
            logger.info("the scheduler's socket is gone")


def connect(address: str) -> socket.socket:
    """The scheduler's end.

    Raises:
        OSError: nobody listens.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(_CONNECT_TIMEOUT_S)
    connection.connect(address)
    return connection


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Write one message; waits where the other end does not read.

    Raises:
        OSError: the other end is gone.
    """
    connection.sendall(json.dumps(message).encode() + b"\n")


def _shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:  # it was not connected, or is not any more
        return
