"""One ``sglang.Engine`` and its processes."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from deployments.engine.errors import EngineSetupError
from deployments.engine.sglang_engine import kv_events, plugin, prometheus
from deployments.engine.sglang_engine.expectations import TELLING_PAGES, TRACING
from deployments.engine.sglang_engine.held_pages import HeldPages
from deployments.engine.sglang_engine.own_params import DRAFT_LINK, SPANS
from deployments.engine.sglang_engine.self_check import (
    DRAFTING,
    SHARING,
    check_installed,
    differences,
)
from deployments.engine.sglang_engine.server_args import environment, server_args, tells_pages
from deployments.engine.sglang_engine.tier_link import TierLink

if TYPE_CHECKING:
    import asyncio
    from collections.abc import AsyncGenerator, Iterator, Sequence
    from contextlib import AbstractContextManager

    from deployments.engine.config import EngineConfig
    from deployments.engine.own_metrics import Sample
    from deployments.engine.prefixes import Report
    from deployments.engine.sglang_engine.tier_link import TierSettings
    from deployments.engine.span_export import SpanExport
    from kv_store.page_store import PageStoreStats

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGQUIT)
_JOIN_S = 30.0


class Load(NamedTuple):
    """What the scheduler said last of itself."""

    num_running: int = 0
    num_waiting: int = 0
    num_total_tokens: int = 0
    num_used_tokens: int = 0


class Runtime(Protocol):
    """What the engine needs of SGLang. All but ``close`` is called on the event loop."""

    def generate(self, arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Items of one generation. Closing the generator aborts it.

        Args:
            arguments: of ``sglang.Engine.async_generate``.

        Raises:
            ValueError: SGLang refuses the arguments.
        """

    def abort(self, rid: str) -> None:
        """End a generation; its last item says so."""

    def load(self) -> Load:
        """A recent snapshot."""

    def dead_process(self) -> str | None:
        """The name of a process of SGLang's that has ended, if one has."""

    def page_store_stats(self) -> PageStoreStats | None:
        """Counters of the KV tier, some seconds old; None where no pages are shared."""

    def owner(self, salt: str, tenant: str) -> None:
        """Pages of requests with this ``cache_salt`` are this tenant's."""

    def held_prefixes(self) -> Report:
        """See ``ReportsPrefixes``."""

    def own_metrics(self) -> Sequence[Sample]:
        """See ``HasOwnMetrics``."""

    def close(self) -> None:
        """End all processes; blocks."""


class SGLangRuntime:
    """The installed SGLang.

    Attributes:
        vocab_size: of the logits.
        eos_token_ids: tokens that end an output.
        max_request_tokens: prompt and output tokens of one sequence that SGLang has room for.
        is_drafted: whether it verifies drafts of the pool.
    """

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        max_model_len: int,
        *,
        draft_address: str | None = None,
        tier: TierSettings | None = None,
        spans: SpanExport | None = None,
    ) -> None:
        """Load the model; takes from seconds to minutes, blocks.

        Args:
            config: the engine's settings.
            folder: the model's files.
            max_model_len: prompt and output tokens of one sequence, at most.
            draft_address: where the scheduler hears of draft replicas, see ``draft_link``; a
                SGLang that cannot be drafted for serves without.
            tier: where pages are shared, if they are; a SGLang that cannot serves without.
            spans: where spans go, if they do; a SGLang that makes other ones serves without.

        Raises:
            EngineSetupError: SGLang is missing, is not the one that is known, or does not start.
        """
        os.environ.update(environment(config, len(os.sched_getaffinity(0))))
        check_installed()
        os.environ.pop(DRAFT_LINK, None)
        self.is_drafted = draft_address is not None and can_draft()
        if self.is_drafted and draft_address is not None:
            os.environ[DRAFT_LINK] = draft_address
        os.environ.pop(SPANS, None)
        is_traced = spans is not None and can_trace()
        if spans is not None and is_traced:
            os.environ[SPANS] = json.dumps(asdict(spans))
            # Without a span for each step.
            os.environ.setdefault("SGLANG_TRACE_LEVEL", "2")
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-sglang-")
        plugin.announce(Path(self._folder.name))
        self._metrics = Path(self._folder.name) / "metrics"
        self._metrics.mkdir()
        os.environ[prometheus.FOLDER] = str(self._metrics)
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.server_args import ServerArgs

        self._tier = TierLink(tier) if tier is not None and can_share() else None
        self._held: HeldPages | None = None
        self._events: kv_events.EventReader | None = None
        if tells_pages(config, has_tier=self._tier is not None) and can_tell_pages():
            self._held = HeldPages()
            # Before SGLang is there, so that nothing it publishes is missed.
            source = partial(kv_events.connect, Path(self._folder.name))
            self._events = kv_events.EventReader(source, self._held)
        others = set(multiprocessing.active_children())
        try:
            with self._offered_tier() as offer, _own_signals_kept():
                arguments = server_args(
                    config,
                    folder,
                    max_model_len=max_model_len,
                    known=ServerArgs.__struct_fields__,
                    is_drafted=self.is_drafted,
                    tier=offer,
                    kv_events=(
                        kv_events.publisher_settings(Path(self._folder.name))
                        if self._held is not None
                        else None
                    ),
                    is_traced=is_traced,
                )
                self._engine = Engine(**arguments)
        except (RuntimeError, ValueError, OSError) as error:
            self._close_folders()
            raise EngineSetupError(f"SGLang does not start: {error}") from error
        self._processes = set(multiprocessing.active_children()) - others
        self._manager = self._engine.tokenizer_manager
        # It would end this process with a signal; the replica notices by itself and hands its
        # requests over.
        self._manager._subprocess_watchdog.stop()  # noqa: SLF001 - SGLang has no setting for it
        model = self._manager.model_config
        self.vocab_size: int = model.vocab_size
        self.eos_token_ids = frozenset[int](model.hf_eos_token_id or ())
        self.max_request_tokens: int = self._manager.max_req_input_len

    async def generate(self, arguments: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """See ``Runtime.generate``."""
        with _own_signals_kept():
            self._manager.auto_create_handle_loop()
        items = await self._engine.async_generate(**arguments)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    def abort(self, rid: str) -> None:
        """See ``Runtime.abort``."""
        self._manager.abort_request(rid)

    def load(self) -> Load:
        """See ``Runtime.load``."""
        loads = self._manager.load_snapshot_reader.read_all()
        return Load(
            num_running=sum(load.num_running_reqs for load in loads),
            num_waiting=sum(load.num_waiting_reqs for load in loads),
            num_total_tokens=sum(load.max_total_num_tokens for load in loads),
            num_used_tokens=sum(load.num_used_tokens for load in loads),
        )

    def dead_process(self) -> str | None:
        """See ``Runtime.dead_process``."""
        return next((child.name for child in self._processes if not child.is_alive()), None)

    def page_store_stats(self) -> PageStoreStats | None:
        """See ``Runtime.page_store_stats``."""
        return None if self._tier is None else self._tier.stats()

    def owner(self, salt: str, tenant: str) -> None:
        """See ``Runtime.owner``."""
        if self._held is not None:
            self._held.owner(salt, tenant)

    def held_prefixes(self) -> Report:
        """See ``Runtime.held_prefixes``."""
        return {} if self._held is None else self._held.report()

    async def attach_tier(self) -> None:
        """Share pages again after ``detach_tier``; SGLang must be idle.

        Raises:
            EngineSetupError: SGLang refuses.
        """
        with self._offered_tier() as offer:
            answer = await self._manager.attach_hicache_storage("dynamic", offer)
        if not answer.success:
            raise EngineSetupError(f"SGLang does not attach the KV tier: {answer.message}")

    async def detach_tier(self) -> None:
        """Close the tier in all of SGLang's processes and serve without; SGLang must be idle.

        Raises:
            EngineSetupError: SGLang refuses.
        """
        answer = await self._manager.detach_hicache_storage()
        if not answer.success:
            raise EngineSetupError(f"SGLang does not detach the KV tier: {answer.message}")

    def close(self) -> None:
        """See ``Runtime.close``."""
        loop = self._manager.event_loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(_cancel, self._manager.asyncio_tasks)
        try:
            self._engine.shutdown()
            for child in self._processes:
                child.join(_JOIN_S)
        finally:
            self._close_folders()

    def own_metrics(self) -> Sequence[Sample]:
        """See ``Runtime.own_metrics``."""
        return prometheus.read_metrics(self._metrics)

    def _offered_tier(self) -> AbstractContextManager[str | None]:
        return nullcontext() if self._tier is None else self._tier.offered()

    def _close_folders(self) -> None:
        if self._events is not None:
            self._events.close()
        self._folder.cleanup()
        if self._tier is not None:
            self._tier.close()


def can_draft() -> bool:
    """Whether this SGLang can verify drafts of the pool; if not, says why."""
    found = differences(DRAFTING)
    if found:
        logger.error("SGLang cannot verify drafts of the pool: %s", "; ".join(found))
    return not found


def can_tell_pages() -> bool:
    """Whether this SGLang can tell routers of its pages; if not, says why."""
    found = differences(TELLING_PAGES)
    if found:
        logger.error("SGLang cannot tell routers of its pages: %s", "; ".join(found))
    return not found


def can_trace() -> bool:
    """Whether this SGLang's spans can be joined to ours; if not, says why."""
    found = differences(TRACING)
    if found:
        logger.error("SGLang's spans cannot be joined to ours: %s", "; ".join(found))
    return not found


def can_share() -> bool:
    """Whether this SGLang can be given a KV tier; if not, says why."""
    found = differences(SHARING)
    if found:
        logger.error("SGLang cannot share pages: %s", "; ".join(found))
    return not found


def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


@contextmanager
def _own_signals_kept() -> Iterator[None]:
    """Put back the handlers that SGLang replaces where it runs on a main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
