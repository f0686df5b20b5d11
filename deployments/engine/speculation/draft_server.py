"""A draft replica's server: gRPC streams in front, one drafter thread behind."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from deployments.engine.speculation.draft_service import DraftLimits, DraftService
from deployments.engine.speculation.errors import DrafterDeadError
from deployments.engine.speculation.grpc_server import GrpcDraftFront
from deployments.engine.speculation.handshake import PROTOCOL_VERSION
from protos import draft_pb2

if TYPE_CHECKING:
    from pydantic import SecretStr

    from deployments.engine.config import PoolTlsConfig
    from deployments.engine.speculation.draft_stats import DraftServerStats
    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.speculation.grpc_transport import GrpcLimits
    from deployments.engine.speculation.handshake import Identity

logger = logging.getLogger(__name__)

_IDLE_INTERVAL_S = 1.0
_HANGS_AFTER_S = 120.0
"""A step that takes longer than this counts as hung."""


class DraftServer:
    """Serves one drafter to any number of targets.

    The drafter is called from one thread only, the server's; ``start``, ``stats`` and ``close`` do
    not belong on an event loop's hot path (``close`` waits for the batch under way).

    Args:
        identity: the model and vocabulary the drafter was made for; other targets are refused.
        secret: what targets must present.
        tls: what to show to targets; None means plain connections.

    Raises:
        OSError: the files for TLS cannot be read.
    """

    def __init__(
        self,
        drafter: Drafter,
        identity: Identity,
        secret: SecretStr,
        *,
        limits: DraftLimits | None = None,
        grpc_limits: GrpcLimits | None = None,
        tls: PoolTlsConfig | None = None,
    ) -> None:
        limits = limits or DraftLimits()
        self._identity = identity
        self._service = DraftService(drafter, vocab_size=identity.vocab_size, limits=limits)
        self._news = threading.Event()
        self._is_closed = False
        self._step_began_at: float | None = None
        self._front = GrpcDraftFront(
            identity,
            secret,
            welcome=draft_pb2.Welcome(
                protocol_version=PROTOCOL_VERSION, max_session_tokens=limits.max_session_tokens
            ),
            accept=self._service.accept,
            on_arrival=self._news.set,
            tls=tls,
            limits=grpc_limits,
        )
        self._thread = threading.Thread(target=self._draft, name="drafter", daemon=True)

    def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen and draft.

        Returns:
            The port targets dial.

        Raises:
            RuntimeError: the address cannot be bound.
        """
        bound = self._front.start(host, port)
        self._thread.start()
        return bound

    def replace_drafter(self, successor: Drafter) -> None:
        """Draft with another one behind the batch under way; no target notices but by its drafts.

        Args:
            successor: for the same model and vocabulary.
        """
        self._service.replace_drafter(successor)
        self._news.set()

    @property
    def vocab_size(self) -> int:
        """Of the targets that are served."""
        return self._identity.vocab_size

    def stats(self) -> DraftServerStats:
        """A snapshot, at most one batch old; may be called from any thread."""
        return self._service.stats()

    @property
    def is_drafting(self) -> bool:
        """Whether the drafter thread lives."""
        return self._thread.is_alive()

    def check_health(self) -> None:
        """Return if drafts can still be made; may be called from any thread.

        Raises:
            DrafterDeadError: the drafter thread does not live, or hangs.
        """
        if not self.is_drafting:
            raise DrafterDeadError("The drafter thread does not run.")
        began_at = self._step_began_at
        if began_at is not None and time.monotonic() - began_at > _HANGS_AFTER_S:
            raise DrafterDeadError(f"A drafting step has not ended for {_HANGS_AFTER_S:.0f} s.")

    def close(self) -> None:
        """End all streams, then stop the drafter thread."""
        self._is_closed = True
        self._front.stop()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join()

    def _draft(self) -> None:
        is_busy = False
        while not self._is_closed:
            if not is_busy:
                self._news.wait(_IDLE_INTERVAL_S)
            self._news.clear()
            self._step_began_at = time.monotonic()
            try:
                is_busy = self._service.step()
            except Exception:
                # The thread's root: whatever went wrong, other sessions still want drafts.
                logger.exception("a drafting step failed")
                is_busy = False
            self._step_began_at = None
        self._service.close()
