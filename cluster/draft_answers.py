"""The target's answers to a training's prompts, before the other stages or beside them."""

from __future__ import annotations

import asyncio
import contextlib
from threading import Event, Thread
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from cluster.config import ClusterConfig
    from deployments.engine.training.job import DraftJob


class Answering:
    """Runs the target's engine on what a job has no answer to.

    Entering has everything answered and the engine's memory freed, unless the job can train
    meanwhile: then a thread goes on answering until the block is left, and an error of it is raised
    where the job waits for an answer, or else when the block ends.
    """

    def __init__(
        self,
        config: ClusterConfig,
        decode: Callable[[Sequence[int]], str],
        job: DraftJob,
        on_progress: Callable[[str], None],
    ) -> None:
        """Nothing runs yet.

        Args:
            config: of the target.
            decode: its tokenizer's.
            job: takes the answers.
            on_progress: told what happens, perhaps from another thread.
        """
        self._config = config
        self._decode = decode
        self._job = job
        self._on_progress = on_progress
        self._error: BaseException | None = None
        self._is_left = Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked: asyncio.Task[None] | None = None
        # A daemon, so that an engine that hangs does not keep a command that is interrupted.
        self._thread = Thread(target=self._run_beside, name="answers", daemon=True)

    def __enter__(self) -> Self:
        """Answer, or begin to.

        Raises:
            EngineError: the engine cannot be started, or died.
        """
        if not self._job.is_answered:
            if self._job.trains_while_answering:
                self._thread.start()
            else:
                self._run()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop answering; what was answered is kept."""
        if self._thread.ident is None:
            return
        self._is_left.set()
        if self._loop and self._asked:
            # It may have ended by itself meanwhile.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._asked.cancel)
        self._thread.join()
        if error is None:
            self.check()

    def check(self) -> None:
        """Raise what ended the answering, if that was an error."""
        if self._error is not None:
            raise self._error

    def _run_beside(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 - who waits for an answer has to hear of any
            self._error = error
            self._job.end_answers(error)

    def _run(self) -> None:
        from deployments.engine.factory import build_engine
        from deployments.engine.speculation.speculator import NoSpeculation

        config = self._config
        self._on_progress(f"starting {config.engine.model}")
        engine = build_engine(
            config.engine,
            cache_dir=config.cache_dir,
            page_store_factory=None,
            speculator=NoSpeculation(),
            detokenize=self._decode,
        )
        # Twice as many as run, so that none waits for the next to arrive; all may have to wait.
        num_concurrent = min(2 * config.engine.max_num_seqs, config.engine.max_waiting)

        async def answer() -> None:
            self._loop = asyncio.get_running_loop()
            self._asked = asyncio.ensure_future(self._job.answer(engine, num_concurrent))
            try:
                if self._is_left.is_set():
                    self._asked.cancel()
                await self._asked
            except asyncio.CancelledError:
                if not self._is_left.is_set():
                    raise
            finally:
                await engine.close()

        asyncio.run(answer())
