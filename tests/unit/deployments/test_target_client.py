from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError

from deployments.engine.embedding import Embedding, EmbeddingRequest
from deployments.engine.errors import (
    DeadlineExceededError,
    EngineDeadError,
    EngineDrainingError,
    EngineGoneError,
    EngineOverloadedError,
    RequestRejectedError,
)
from deployments.engine.types import (
    FinishReason,
    GenerationRequest,
    GenerationUsage,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
)
from deployments.errors import TargetBusyError, TargetUnavailableError, describe
from deployments.target_client import TargetClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator

LOST = ActorUnavailableError("gone", None)


class Stream:
    """What a streaming handle call returns: deltas, as many together as are given."""

    def __init__(self, deltas: AsyncIterator[TokenDelta], num_together: int) -> None:
        self._deltas = deltas
        self._num_together = num_together
        self.is_cancelled = False

    async def __aiter__(self) -> AsyncIterator[tuple[TokenDelta, ...]]:
        together: list[TokenDelta] = []
        async for delta in self._deltas:
            together.append(delta)
            if len(together) == self._num_together or delta.finish_reason is not None:
                yield tuple(together)
                together.clear()

    def cancel(self) -> None:
        self.is_cancelled = True


class Pool:
    """A target pool whose replicas count: output token i is i, with log probability -i.

    Each may die after some tokens.
    """

    def __init__(self, *lives: int | None, error: Exception = LOST, num_together: int = 1) -> None:
        self._lives = list(lives)
        self._error = error
        self._num_together = num_together
        self.requests: list[GenerationRequest] = []
        self.streams: list[Stream] = []

    def options(self, **options: object) -> Pool:
        assert options in ({"stream": True, "method_name": "generate"}, {"method_name": "embed"})
        return self

    def remote(self, request: GenerationRequest) -> Stream:
        self.requests.append(request)
        life = self._lives.pop(0)
        deltas = self._generate(request, life, f"replica{len(self.requests)}")
        self.streams.append(Stream(deltas, self._num_together))
        return self.streams[-1]

    async def _generate(
        self, request: GenerationRequest, life: int | None, replica: str
    ) -> AsyncIterator[TokenDelta]:
        at = len(request.resumed_output_ids)
        for _ in range(life) if life is not None else iter(int, 1):
            await asyncio.sleep(0)
            at += 1
            is_last = at == request.sampling.max_tokens
            yield TokenDelta(
                request_id=request.request_id,
                token_ids=(at,),
                finish_reason=FinishReason.LENGTH if is_last else None,
                replica_id=replica,
                logprobs=(TokenLogprob(at, -at, 1),),
                prompt_logprobs=(None,) if at == 1 else None,
            )
            if is_last:
                return
        raise self._error


def as_ray_raises(error: Exception) -> Exception:
    task_error = RayTaskError("generate", "Traceback of the replica", error, "title", 1, "ip")
    raised = task_error.as_instanceof_cause()
    assert isinstance(raised, Exception)
    assert str(raised) != str(error)
    return raised


def request(max_tokens: int = 6, deadline: float | None = None) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        prompt_token_ids=(1, 2),
        sampling=SamplingParams(max_tokens=max_tokens, seed=1),
        avoid_replicas=("operator",),
        deadline=deadline,
    )


def client(
    pool: Pool, on_resume: Callable[[], None] = lambda: None, resumes: int = 3
) -> TargetClient:
    return TargetClient(pool, max_resumes=resumes, on_resume=on_resume)


async def tokens(target: TargetClient, wanted: GenerationRequest) -> list[int]:
    return [token for delta in await deltas_of(target, wanted) for token in delta.token_ids]


async def deltas_of(target: TargetClient, wanted: GenerationRequest) -> list[TokenDelta]:
    return [delta async for together in target.stream(wanted) for delta in together]


async def test_one_replica_that_lives() -> None:
    pool = Pool(None)
    assert await tokens(client(pool), request()) == [1, 2, 3, 4, 5, 6]
    assert not pool.streams[0].is_cancelled


async def test_deltas_that_come_together_stay_together() -> None:
    pool = Pool(4, None, num_together=2)
    sizes = [len(together) async for together in client(pool).stream(request())]
    assert sizes == [2, 2, 2]
    assert pool.requests[1].resumed_output_ids == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("lives", "error"),
    [
        ((2, None), LOST),
        ((0, None), LOST),
        ((1, 1, None), LOST),
        ((2, 0, 1, None), LOST),
        ((2, 0, None), EngineDeadError("dead")),
        ((2, 0, 1, None), EngineDrainingError("draining")),
    ],
)
async def test_the_text_survives_dead_replicas(
    lives: tuple[int | None, ...], error: Exception
) -> None:
    pool = Pool(*lives, error=error)
    resumes: list[None] = []
    assert await tokens(client(pool, lambda: resumes.append(None)), request()) == [1, 2, 3, 4, 5, 6]
    assert len(resumes) == len(lives) - 1
    delivered = 0
    for life, sent in zip(lives, pool.requests, strict=True):
        assert sent.resumed_output_ids == tuple(range(1, delivered + 1))
        delivered += life or 0
    # Only replicas that named themselves can be avoided; the operator's wish is kept.
    died = [f"replica{n + 1}" for n, life in enumerate(lives[:-1]) if life]
    assert pool.requests[-1].avoid_replicas == ("operator", *died)


@pytest.mark.parametrize("lives", [(None,), (2, None), (0, None), (2, 0, 1, None)])
async def test_log_probabilities_survive_dead_replicas(lives: tuple[int | None, ...]) -> None:
    target = client(Pool(*lives))
    deltas = await deltas_of(target, request())
    told = [entry for delta in deltas for entry in delta.logprobs]
    assert [(entry.token_id, entry.logprob) for entry in told] == [(i, -i) for i in range(1, 7)]
    assert [delta.prompt_logprobs for delta in deltas] == [(None,), *[None] * 5]


class NamedPool(Pool):
    """Replicas that tell their name: ahead of their first token, or in their error."""

    def __init__(self, *lives: int | None, error: Exception = LOST, says_hello: bool) -> None:
        super().__init__(*lives, error=error)
        self._says_hello = says_hello

    async def _generate(
        self, request: GenerationRequest, life: int | None, replica: str
    ) -> AsyncIterator[TokenDelta]:
        if self._says_hello:
            yield TokenDelta(request_id=request.request_id, token_ids=(), replica_id=replica)
        try:
            async for delta in super()._generate(request, life, replica):
                yield delta
        except EngineGoneError as error:
            raise error.at(replica) from error


@pytest.mark.parametrize(
    ("error", "says_hello"),
    [(EngineDeadError("dead"), False), (EngineDrainingError("draining"), False), (LOST, True)],
)
async def test_a_replica_that_fails_before_its_first_token_is_avoided(
    error: Exception, *, says_hello: bool
) -> None:
    pool = NamedPool(0, 0, None, error=error, says_hello=says_hello)
    deltas = await deltas_of(client(pool), request())
    assert [token for delta in deltas for token in delta.token_ids] == [1, 2, 3, 4, 5, 6]
    assert all(delta.token_ids for delta in deltas)
    assert [sent.avoid_replicas for sent in pool.requests] == [
        ("operator",),
        ("operator", "replica1"),
        ("operator", "replica1", "replica2"),
    ]


async def test_a_request_that_kills_engines_is_resumed_on_two_replicas_at_most() -> None:
    pool = NamedPool(*[1] * 9, error=EngineDeadError("dead"), says_hello=False)
    with pytest.raises(TargetUnavailableError):
        await tokens(client(pool, resumes=8), request(9))
    assert len(pool.requests) == 3


async def test_a_replica_that_dies_between_last_token_and_last_delta() -> None:
    class Late(Pool):
        async def _generate(
            self, request: GenerationRequest, life: int | None, replica: str
        ) -> AsyncIterator[TokenDelta]:
            async for delta in super()._generate(request, life, replica):
                yield replace(delta, finish_reason=None)
                if delta.finish_reason is not None:
                    raise LOST

    pool = Late(None)
    deltas = await deltas_of(client(pool), request(3))
    assert [token for delta in deltas for token in delta.token_ids] == [1, 2, 3]
    assert deltas[-1].finish_reason is FinishReason.LENGTH
    assert deltas[-1].usage == GenerationUsage(num_prompt_tokens=2, num_output_tokens=3)
    assert len(pool.requests) == 1


async def test_a_death_behind_the_last_delta_is_nothing() -> None:
    class Late(Pool):
        async def _generate(
            self, request: GenerationRequest, life: int | None, replica: str
        ) -> AsyncIterator[TokenDelta]:
            async for delta in super()._generate(request, life, replica):
                yield delta
            raise LOST

    pool = Late(None)
    assert await tokens(client(pool), request(3)) == [1, 2, 3]
    assert len(pool.requests) == 1


async def test_resumes_are_bounded() -> None:
    pool = Pool(1, 1, 1, 1)
    with pytest.raises(TargetUnavailableError):
        await tokens(client(pool, resumes=2), request())
    assert len(pool.requests) == 3


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (EngineOverloadedError("full", 3.0), EngineOverloadedError),
        (RequestRejectedError("too long", "prompt"), RequestRejectedError),
        (BackPressureError(1, 1), TargetBusyError),
        (KeyError("bug"), KeyError),
    ],
)
async def test_other_errors_are_not_retried(raised: Exception, seen: type[Exception]) -> None:
    pool = Pool(1, None, error=raised)
    with pytest.raises(seen):
        await tokens(client(pool), request())
    assert len(pool.requests) == 1


async def test_an_engines_error_keeps_its_words_on_rays_transport() -> None:
    wrapped = as_ray_raises(RequestRejectedError("too long", "prompt"))
    with pytest.raises(RequestRejectedError) as caught:
        await tokens(client(Pool(0, error=wrapped)), request())
    assert describe(caught.value).message == "too long"
    assert describe(caught.value).param == "prompt"


async def test_a_dead_engine_is_avoided_on_rays_transport() -> None:
    pool = Pool(0, None, error=as_ray_raises(EngineDeadError("dead", "replica1")))
    assert await tokens(client(pool), request(2)) == [1, 2]
    assert pool.requests[1].avoid_replicas == ("operator", "replica1")


async def test_leaving_early_cancels_the_replica() -> None:
    pool = Pool(None)
    async with aclosing(client(pool).stream(request(1000))) as deltas:
        await anext(deltas)
    assert pool.streams[0].is_cancelled


async def test_a_replica_that_hangs_past_the_deadline_is_left() -> None:
    class Hanging(Pool):
        async def _generate(
            self, request: GenerationRequest, life: int | None, replica: str
        ) -> AsyncIterator[TokenDelta]:
            await asyncio.Event().wait()
            yield TokenDelta(request_id="r", token_ids=())

    pool = Hanging(None)
    with pytest.raises(DeadlineExceededError):
        await tokens(client(pool), request(deadline=time.time() - 10))
    assert pool.streams[0].is_cancelled


class Response:
    """What a unary handle call returns."""

    def __init__(self, answer: Embedding | Exception | None) -> None:
        self._answer = answer
        self.is_cancelled = False

    def __await__(self) -> Generator[None, None, Embedding]:
        return self._wait().__await__()

    async def _wait(self) -> Embedding:
        if self._answer is None:
            await asyncio.Event().wait()
        if isinstance(self._answer, Embedding):
            return self._answer
        raise self._answer or AssertionError

    def cancel(self) -> None:
        self.is_cancelled = True


class EmbeddingPool(Pool):
    """A target pool that gives the answers it was told to."""

    def __init__(self, *answers: Embedding | Exception | None) -> None:
        super().__init__()
        self.responses = [Response(answer) for answer in answers]
        self.embedded: list[EmbeddingRequest] = []

    def remote(self, request: Any) -> Any:
        self.embedded.append(request)
        return self.responses[len(self.embedded) - 1]


VECTOR = Embedding(
    request_id="e",
    values=np.ones(2, dtype=np.float32),
    usage=GenerationUsage(num_prompt_tokens=2, num_output_tokens=0),
)


def text(deadline: float | None = None) -> EmbeddingRequest:
    return EmbeddingRequest(
        request_id="e", prompt_token_ids=(1, 2), avoid_replicas=("operator",), deadline=deadline
    )


async def test_an_embedding_survives_dead_replicas() -> None:
    resumes: list[None] = []
    pool = EmbeddingPool(as_ray_raises(EngineDeadError("dead", "replica1")), LOST, VECTOR)
    assert await client(pool, lambda: resumes.append(None)).embed(text()) is VECTOR
    assert len(resumes) == 2
    assert pool.embedded[-1].avoid_replicas == ("operator", "replica1")


@pytest.mark.parametrize(
    ("answers", "seen", "num_calls"),
    [
        ([BackPressureError(1, 1)], TargetBusyError, 1),
        ([as_ray_raises(RequestRejectedError("no", "input"))], RequestRejectedError, 1),
        ([LOST] * 9, TargetUnavailableError, 4),
        ([EngineDeadError("dead")] * 9, TargetUnavailableError, 3),
    ],
)
async def test_an_embedding_fails_in_this_packages_words(
    answers: list[Exception], seen: type[Exception], num_calls: int
) -> None:
    pool = EmbeddingPool(*answers)
    with pytest.raises(seen):
        await client(pool).embed(text())
    assert len(pool.embedded) == num_calls


async def test_an_embedding_that_is_overdue_or_not_wanted_is_cancelled() -> None:
    pool = EmbeddingPool(None, None)
    with pytest.raises(DeadlineExceededError):
        await client(pool).embed(text(deadline=time.time() - 2))
    task = asyncio.create_task(client(pool).embed(text()))
    async with asyncio.timeout(60):
        while len(pool.embedded) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert all(response.is_cancelled for response in pool.responses)
