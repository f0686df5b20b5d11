"""The scheduler's speculator, and the thread that hears from the actor."""

from __future__ import annotations

import json
import logging
import socket
import threading
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from deployments.engine.sglang_engine.draft_link import DraftSettings, connect, send
from deployments.engine.sglang_engine.step_stalls import StepStalls
from deployments.engine.speculation.grpc_transport import grpc_connector
from deployments.engine.speculation.split_speculator import SplitSpeculator

if TYPE_CHECKING:
    from io import TextIOWrapper

logger = logging.getLogger(__name__)

_STATS_PERIOD_S = 1.0


class DraftClient:
    """Lives as long as the scheduler's process.

    Attributes:
        speculator: the same that the embedded engine uses; the scheduler's thread drives it.
        settings: what the actor sent.
        stalls: of the scheduler's steps; who runs them adds to it.
    """

    def __init__(self, address: str, *, takes_trees: bool) -> None:
        """Connect to the actor and read its settings.

        Args:
            address: of the actor's socket.
            takes_trees: whether SGLang verifies drafts with branches.

        Raises:
            OSError: nobody listens at the address, or says nothing.
        """
        self.stalls = StepStalls()
        self._connection = connect(address)
        self._sending = threading.Lock()
        lines = self._connection.makefile("r", encoding="utf-8")
        self.settings = DraftSettings.from_json(json.loads(lines.readline()))
        self._connection.settimeout(None)
        identity = self.settings.identity
        self.speculator = SplitSpeculator(
            self.settings.speculation,
            vocab_size=identity.vocab_size,
            connect=grpc_connector(
                identity,
                self.settings.replica_id,
                self.settings.secret,
                tls=self.settings.speculation.pool_tls,
            ),
            on_link_lost=lambda endpoint: self._tell({"lost": endpoint}),
            takes_trees=takes_trees,
        )
        self._is_over = threading.Event()
        for target, arguments in ((self._listen, (lines,)), (self._report, ())):
            threading.Thread(target=target, args=arguments, name="draft-link", daemon=True).start()

    def close(self) -> None:
        """Leave the socket and the draft replicas."""
        self._is_over.set()
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the actor was first
            logger.debug("the actor's socket was gone")
        self.speculator.shutdown()

    def _listen(self, lines: TextIOWrapper) -> None:
        try:
            with lines:
                for line in lines:
                    message = json.loads(line)
                    if "attach" in message:
                        self.speculator.attach(message["attach"], message["endpoint"])
                    elif "detach" in message:
                        self.speculator.detach(message["detach"])
        except OSError:
            logger.info("the actor's socket is gone")
        self._is_over.set()

    def _report(self) -> None:
        while not self._is_over.wait(_STATS_PERIOD_S):
            stats = replace(self.speculator.stats(), stall_p50_s=self.stalls.p50_s)
            self._tell({"stats": asdict(stats)})

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            with self._sending:
                send(self._connection, message)
        except OSError:
            self._is_over.set()
