"""The ingress's view of the target pool: one uninterrupted stream per request.

The ingress owns the transcript. When a replica dies under a request, the request goes to another
one with the tokens delivered so far, and because every token is a pure function of the request and
those tokens, the client sees the text it would have seen anyway.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.engine.errors import DeadlineExceededError, EngineDeadError, EngineGoneError
from deployments.engine.types import FinishReason, GenerationUsage, TokenDelta
from deployments.errors import RequestCancelledError, TargetBusyError, TargetUnavailableError
from deployments.serve_compat import (
    is_cancelled,
    is_deployment_failed,
    is_queue_full,
    is_replica_lost,
    original_error,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from deployments.engine.embedding import Embedding, EmbeddingRequest
    from deployments.engine.types import GenerationRequest
    from deployments.serve_compat import Handle

logger = logging.getLogger(__name__)

_DEADLINE_GRACE_S = 2.0
"""The engine reports a passed deadline itself; this much later nobody waits for it any more."""
_RESUME_PAUSE_S = 0.05
_MAX_RESUMES_AFTER_DEAD_ENGINES = 2
"""A request that itself kills engines must not work its way through the whole pool."""


class TargetClient:
    """Streams tokens from whichever target replicas it takes."""

    def __init__(self, target: Handle, *, max_resumes: int, on_resume: Callable[[], None]) -> None:
        """Wrap a deployment handle.

        Args:
            target: handle of the target deployment.
            max_resumes: moves to another replica per request, at most.
            on_resume: called at every such move.
        """
        self._generate = target.options(stream=True, method_name="generate")
        self._embed = target.options(method_name="embed")
        self._max_resumes = max_resumes
        self._on_resume = on_resume

    async def stream(
        self, request: GenerationRequest
    ) -> AsyncGenerator[tuple[TokenDelta, ...], None]:
        """Deltas of one sequence, the last one with a finish reason; some come together.

        Closing the generator cancels the sequence at its replica.

        Raises:
            EngineError: the engine refused or ended the request.
            TargetBusyError: all replicas and the queue before them are full.
            TargetUnavailableError: more replicas died than may, see ``max_resumes``.
            DeadlineExceededError: the deadline passed, reported by the engine or not.
        """
        transcript = list(request.resumed_output_ids)
        avoid = list(request.avoid_replicas)
        num_dead_engines = 0
        for attempt in range(self._max_resumes + 1):
            if attempt:
                self._on_resume()
                await asyncio.sleep(_RESUME_PAUSE_S * attempt)
            if transcript and len(transcript) >= request.sampling.max_tokens:
                yield (_ended_by_length(request, transcript),)
                return
            replica_id = ""
            is_finished = False
            try:
                if attempt:
                    request = replace(
                        request, resumed_output_ids=tuple(transcript), avoid_replicas=tuple(avoid)
                    )
                async with aclosing(self._attempt(request)) as arrivals:
                    async for together in arrivals:
                        replica_id = together[-1].replica_id
                        # The replica may only have told its name.
                        deltas = tuple(filter(_tells_something, together))
                        for delta in deltas:
                            transcript.extend(delta.token_ids)
                            is_finished = delta.finish_reason is not None
                        if deltas:
                            yield deltas
            except _ReplicaLostError as lost:
                replica_id = lost.replica_id or replica_id
                num_dead_engines += lost.is_engine_dead
            # Read to its end, because a stream that is left early counts as cancelled.
            if is_finished:
                return
            logger.warning(
                "target replica %s was lost after %d tokens of %s",
                replica_id or "(before it told its name)",
                len(transcript),
                request.request_id,
            )
            if replica_id:
                avoid.append(replica_id)
            if num_dead_engines > _MAX_RESUMES_AFTER_DEAD_ENGINES:
                break
        raise TargetUnavailableError("The model's replicas failed repeatedly under this request.")

    async def embed(self, request: EmbeddingRequest) -> Embedding:
        """Embed one text. Cancelling the task ends the call at its replica.

        Raises:
            EngineError: the engine refused or ended the request.
            TargetBusyError: all replicas and the queue before them are full.
            TargetUnavailableError: more replicas died than may, see ``max_resumes``.
            DeadlineExceededError: the deadline passed, reported by the engine or not.
        """
        avoid = list(request.avoid_replicas)
        num_dead_engines = 0
        for attempt in range(self._max_resumes + 1):
            if attempt:
                self._on_resume()
                await asyncio.sleep(_RESUME_PAUSE_S * attempt)
            response = self._embed.remote(replace(request, avoid_replicas=tuple(avoid)))
            try:
                async with asyncio.timeout_at(_loop_deadline(request.deadline)):
                    embedding: Embedding = await response
            except TimeoutError as error:
                response.cancel()
                raise DeadlineExceededError("The request's deadline passed.") from error
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                translated = _translated(error)
                if not isinstance(translated, _ReplicaLostError):
                    raise translated from error
                if translated.replica_id:
                    avoid.append(translated.replica_id)
                num_dead_engines += translated.is_engine_dead
            else:
                return embedding
            if num_dead_engines > _MAX_RESUMES_AFTER_DEAD_ENGINES:
                break
        raise TargetUnavailableError("The model's replicas failed repeatedly under this request.")

    async def _attempt(
        self, request: GenerationRequest
    ) -> AsyncGenerator[tuple[TokenDelta, ...], None]:
        deadline = _loop_deadline(request.deadline)
        stream = self._generate.remote(request)
        finished = False
        try:
            items = aiter(stream)
            while True:
                async with asyncio.timeout_at(deadline):
                    together = await anext(items)
                yield together
        except StopAsyncIteration:
            finished = True
        except TimeoutError as error:
            raise DeadlineExceededError("The request's deadline passed.") from error
        except Exception as error:
            finished = True
            raise _translated(error) from error
        finally:
            if not finished:
                stream.cancel()


def _loop_deadline(deadline: float | None) -> float | None:
    """When the engine's own answer to a passed deadline is overdue, on the event loop's clock."""
    if deadline is None:
        return None
    return asyncio.get_running_loop().time() + deadline - time.time() + _DEADLINE_GRACE_S


class _ReplicaLostError(Exception):
    """The replica is gone; the transcript goes on elsewhere.

    Args:
        replica_id: which one, where the error told.
        is_engine_dead: its engine died, perhaps of this very request.
    """

    def __init__(self, replica_id: str, *, is_engine_dead: bool) -> None:
        super().__init__(replica_id)
        self.replica_id = replica_id
        self.is_engine_dead = is_engine_dead


def _translated(error: Exception) -> Exception:
    """Serve's exceptions in this package's words; an engine's own pass as they were raised."""
    error = original_error(error)
    if is_replica_lost(error):
        return _ReplicaLostError(
            error.replica_id if isinstance(error, EngineGoneError) else "",
            is_engine_dead=isinstance(error, EngineDeadError),
        )
    if is_queue_full(error):
        return TargetBusyError("All model replicas are busy; try again shortly.", 1.0)
    if is_deployment_failed(error):
        return TargetUnavailableError("The model's replicas could not be started.")
    if is_cancelled(error):
        return RequestCancelledError("The request was cancelled.")
    return error


def _tells_something(delta: TokenDelta) -> bool:
    return bool(delta.token_ids) or delta.finish_reason is not None


def _ended_by_length(request: GenerationRequest, transcript: list[int]) -> TokenDelta:
    return TokenDelta(
        request_id=request.request_id,
        token_ids=(),
        choice_index=request.choice_index,
        finish_reason=FinishReason.LENGTH,
        usage=GenerationUsage(
            num_prompt_tokens=len(request.prompt_token_ids), num_output_tokens=len(transcript)
        ),
    )
