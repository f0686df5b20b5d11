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
from deployments.drafters import STUDENT, build_drafter, max_text_tokens
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.draft_service import DraftLimits
from deployments.engine.speculation.grpc_transport import GrpcLimits
from deployments.engine.speculation.handshake import Identity
from deployments.heap import settle_heap
from deployments.model_files import model_folder, served_model_name
from deployments.scaling_stats import DraftScalingStats
from deployments.tokenizer import load_vocabulary
from deployments.tracing import Tracing

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.config import DraftPoolConfig, TracingConfig
    from deployments.draft_refresh import DraftRefresh
    from deployments.engine.config import EngineConfig
    from deployments.engine.speculation.drafters.base import Drafter

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
        self._scaling = DraftScalingStats()
        self._model = served_model_name(engine)
        self._executor = ThreadPoolExecutor(1, "draft-lifecycle")
        loop = asyncio.get_running_loop()
        self._host = ray.util.get_node_ip_address()
        self._refresh: DraftRefresh | None = None
        self._identity, self._server, self._port = await loop.run_in_executor(
            self._executor, self._start, engine, draft, cache_dir
        )
        self._reporting = asyncio.create_task(self._report(), name="draft-metrics")
        settle_heap()

    async def reconfigure(self, user_config: dict[str, str]) -> None:
        """Put another drafter to work while the replica serves; Serve calls this.

        Nothing else can be changed so. A drafter that cannot be had, or does not fit the targets,
        leaves the old one at work.

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
            await loop.run_in_executor(self._executor, self._replace, draft)
        except Exception:
            # Whatever it cannot be had for, the pool goes on.
            logger.exception("%s stays at work: there is no %s", self._draft.drafter, draft.drafter)
            return
        self._draft = draft
        logger.info("drafting with %s", draft.drafter)

    def record_replica_metadata(self) -> dict[str, str]:
        """What targets learn of this replica when the router chooses it for them."""
        return {
            ENDPOINT_KEY: f"{self._host}:{self._port}",
            "model": self._model,
            "vocab_digest": self._identity.vocab_digest,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy learns of this replica; Serve asks."""
        return self._scaling.figures(self._server.stats())

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
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_REPORT_PERIOD_S)
            try:
                self._metrics.server(self._server.stats())
                await loop.run_in_executor(self._executor, self._poll)
            except Exception:
                # The task's root: the students' folder may be gone, full or read-only for a while,
                # and drafts go on as they are.
                logger.exception("this round of reports is cut short; the next one starts anew")

    def _poll(self) -> None:
        if self._refresh is not None:
            self._refresh.poll()

    def _replace(self, draft: DraftPoolConfig) -> None:
        successor = build_drafter(draft, self._engine, self._cache_dir)
        self._refresh = self._follow(draft, self._server, successor)
        self._server.replace_drafter(successor)
        self._metrics.trial(is_running=False)

    def _follow(
        self, draft: DraftPoolConfig, server: DraftServer, drafter: Drafter
    ) -> DraftRefresh | None:
        """What keeps a student up to date; None for other drafters."""
        if draft.drafter != STUDENT or self._engine.kind == "simulated":
            return None
        from deployments.draft_refresh import DraftRefresh
        from deployments.engine.torch_engine.student_shelf import StudentShelf
        from deployments.engine.torch_engine.weights.loader import weights_digest

        digest = weights_digest(model_folder(self._engine.model, self._cache_dir))
        return DraftRefresh(
            server,
            StudentShelf(self._cache_dir, digest),
            drafter,
            build=lambda path: build_drafter(
                draft, self._engine, self._cache_dir, student_file=path
            ),
            rule=draft.canary,
            metrics=self._metrics,
        )

    def _stop(self) -> None:
        self._server.close()
        # Afterwards, for closing the server ends the spans of its sessions.
        self._tracing.close()

    def _start(
        self, engine: EngineConfig, draft: DraftPoolConfig, cache_dir: Path
    ) -> tuple[Identity, DraftServer, int]:
        vocabulary = load_vocabulary(engine, model_folder(engine.model, cache_dir))
        identity = Identity(
            model=self._model,
            vocab_size=vocabulary.vocab_size,
            vocab_digest=vocabulary.vocab_digest(),
        )
        drafter = build_drafter(draft, engine, cache_dir)
        server = DraftServer(
            drafter,
            identity,
            draft.secret,
            limits=DraftLimits(
                max_sessions=draft.max_sessions, max_session_tokens=max_text_tokens(draft, engine)
            ),
            # A target has a stream while it has sessions, and a little longer.
            grpc_limits=GrpcLimits(max_streams=max(GrpcLimits().max_streams, draft.max_sessions)),
            tls=engine.speculation.pool_tls,
        )
        self._refresh = self._follow(draft, server, drafter)
        port = server.start(self._host)
        logger.info("drafting for %s at %s:%d", self._model, self._host, port)
        return identity, server, port


DraftDeployment = serve.deployment(name="draft", max_ongoing_requests=256)(DraftReplica)
