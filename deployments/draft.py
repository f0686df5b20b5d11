"""A draft replica: a drafter behind a gRPC stream server that target replicas dial themselves."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import ray
from ray import serve

from deployments.draft_metrics import DraftMetrics
from deployments.draft_sessions import ENDPOINT_KEY
from deployments.drafters import build_drafter
from deployments.engine.errors import EngineError
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.draft_service import DraftLimits
from deployments.engine.speculation.errors import DrafterLoadError
from deployments.engine.speculation.handshake import Identity
from deployments.model_files import model_folder, served_model_name
from deployments.tokenizer import Tokenizer
from deployments.tracing import Tracing

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.config import DraftPoolConfig, TracingConfig
    from deployments.engine.config import EngineConfig

logger = logging.getLogger(__name__)

_REPORT_PERIOD_S = 2.0


class DraftReplica:
    """Serves guesses. Serve handles only choose it; its tokens travel on streams of their own."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self,
        *,
        engine: EngineConfig,
        draft: DraftPoolConfig,
        cache_dir: Path,
        tracing: TracingConfig,
    ) -> None:
        """Load the drafter on a thread of its own and listen on a free port.

        Args:
            engine: the targets' engine, whose model and vocabulary the drafter must share.
            draft: which drafter, and how much of everything.
            cache_dir: where models and fitted drafts lie.
            tracing: where spans go.
        """
        self._engine, self._draft, self._cache_dir = engine, draft, cache_dir
        self._tracing = Tracing(tracing, "paceline-draft")
        self._metrics = DraftMetrics()
        self._model = served_model_name(engine)
        self._executor = ThreadPoolExecutor(1, "draft-lifecycle")
        loop = asyncio.get_running_loop()
        self._host = ray.util.get_node_ip_address()
        self._identity, self._server, self._port = await loop.run_in_executor(
            self._executor, self._start, engine, draft, cache_dir
        )
        self._reporting = asyncio.create_task(self._report(), name="draft-metrics")

    async def reconfigure(self, user_config: dict[str, str]) -> None:
        """Put another drafter to work while the replica serves; Serve calls this.

        Nothing else can be changed so. A drafter that cannot be had leaves the old one at work.

        Args:
            user_config: ``drafter``, as ``draft.drafter``.

        Raises:
            ValueError: it says something else.
        """
        if user_config.keys() != {"drafter"}:
            raise ValueError(
                f"user_config of a draft pool is drafter, not {', '.join(user_config)}"
            )
        draft = self._draft.model_copy(update=user_config)
        if draft == self._draft:
            return
        loop = asyncio.get_running_loop()
        try:
            successor = await loop.run_in_executor(
                self._executor, build_drafter, draft, self._engine, self._cache_dir
            )
        except (EngineError, DrafterLoadError):
            logger.exception("%s stays at work: there is no %s", self._draft.drafter, draft.drafter)
            return
        self._server.replace_drafter(successor)
        self._draft = draft
        logger.info("drafting with %s", draft.drafter)

    def record_replica_metadata(self) -> dict[str, str]:
        """What targets learn of this replica when the router chooses it for them."""
        return {
            ENDPOINT_KEY: f"{self._host}:{self._port}",
            "model": self._model,
            "vocab_digest": self._identity.vocab_digest,
        }

    def check_health(self) -> None:
        """Serve's health check: a drafter that died or hangs has the replica replaced."""
        self._server.check_health()

    async def __call__(self) -> str:
        """The endpoint; Serve reserves slots under this method."""
        return f"{self._host}:{self._port}"

    async def __del__(self) -> None:
        """Serve's shutdown hook: end the streams; targets go on with local drafts."""
        self._reporting.cancel()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._stop)
        self._executor.shutdown(wait=False)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_PERIOD_S)
            self._metrics.server(self._server.stats())

    def _stop(self) -> None:
        self._server.close()
        # Afterwards, for closing the server ends the spans of its sessions.
        self._tracing.close()

    def _start(
        self, engine: EngineConfig, draft: DraftPoolConfig, cache_dir: Path
    ) -> tuple[Identity, DraftServer, int]:
        tokenizer = Tokenizer.load(model_folder(engine.model, cache_dir))
        identity = Identity(
            model=self._model,
            vocab_size=tokenizer.vocab_size,
            vocab_digest=tokenizer.vocab_digest(),
        )
        server = DraftServer(
            build_drafter(draft, engine, cache_dir),
            identity,
            draft.secret,
            limits=DraftLimits(
                max_sessions=draft.max_sessions, max_session_tokens=draft.max_session_tokens
            ),
        )
        port = server.start(self._host)
        logger.info("drafting for %s at %s:%d", self._model, self._host, port)
        return identity, server, port


DraftDeployment = serve.deployment(name="draft", max_ongoing_requests=256)(DraftReplica)
