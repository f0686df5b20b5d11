"""One embeddings call around a target pool that answers when it is told to."""

from __future__ import annotations

import asyncio
import base64
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deployments.config import IngressConfig
from deployments.embedding import EmbeddingAnswer, Embeddings
from deployments.engine.embedding import Embedding, EmbeddingRequest, Pooling
from deployments.engine.errors import EngineOverloadedError, RequestRejectedError
from deployments.engine.types import GenerationUsage
from deployments.errors import ContextLengthError, RequestInvalidError
from deployments.generation import CallContext
from deployments.openai_answers import embeddings_body
from deployments.openai_api import EmbeddingCall
from deployments.target import TargetReplica


class Target:
    """Embeds token i as [i]; may fail, or hold every answer back."""

    def __init__(self, *, fails_at: int | None = None, holds: bool = False) -> None:
        self.requests: list[EmbeddingRequest] = []
        self.num_running = 0
        self.num_cancelled = 0
        self._fails_at = fails_at
        self._holds = holds

    async def embed(self, request: EmbeddingRequest) -> Embedding:
        self.requests.append(request)
        self.num_running += 1
        try:
            if request.prompt_token_ids == (self._fails_at,):
                raise EngineOverloadedError("full")
            await (asyncio.Event().wait() if self._holds else asyncio.sleep(0))
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1
        return Embedding(
            request_id=request.request_id,
            values=np.array(request.prompt_token_ids, dtype=np.float32),
            usage=GenerationUsage(num_prompt_tokens=1, num_output_tokens=0, num_cached_tokens=1),
            replica_id=f"replica of {request.prompt_token_ids[0]}",
        )


class Observer:
    def __init__(self) -> None:
        self.events: list[Any] = []

    def observe(self, surface: str, tenant: str) -> Observer:
        self.events.append((surface, tenant))
        return self

    def finished(self, usage: GenerationUsage) -> None:
        self.events.append(usage.num_prompt_tokens)

    def failed(self) -> None:
        self.events.append("failed")

    def close(self) -> None:
        self.events.append("closed")


class Encoder:
    async def encode_text(self, text: str, param: str) -> tuple[int, ...]:
        return tuple(text.encode())

    def check_token_ids(self, token_ids: list[int], param: str) -> tuple[int, ...]:
        return tuple(token_ids)


CONTEXT = CallContext(
    surface="http",
    tenant=SimpleNamespace(name="one", tenant_key=bytes(range(32)), priority=3),
    deadline=12.0,
    traceparent="00-1",
    avoid_replicas=("bad",),
)


def call(*inputs: str | list[int], pooling: Pooling = Pooling.MEAN) -> EmbeddingCall:
    return EmbeddingCall(list(inputs), pooling, normalize=False, param="input")


def embeddings(target: Target, observer: Observer, **config: Any) -> Embeddings:
    return Embeddings(
        Encoder(),
        target,
        IngressConfig(**config),
        observer,
        max_model_len=6,
    )


async def test_vectors_come_in_the_order_of_the_texts_a_few_at_a_time() -> None:
    target, observer = Target(holds=True), Observer()
    inputs = [[index] for index in range(20)]
    held = asyncio.create_task(embeddings(target, observer).embed(call(*inputs), CONTEXT))
    async with asyncio.timeout(60):
        while target.num_running < 8:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
    assert target.num_running == len(target.requests) == 8
    held.cancel()
    with pytest.raises(asyncio.CancelledError):
        await held
    assert (target.num_running, target.num_cancelled) == (0, 8)
    assert observer.events == [("http", "one"), "closed"]

    target, observer = Target(), Observer()
    answer = await embeddings(target, observer).embed(call(*inputs), CONTEXT)
    assert [vector.tolist() for vector in answer.vectors] == inputs
    assert (answer.usage.num_prompt_tokens, answer.usage.num_cached_tokens) == (20, 20)
    assert answer.replica_id == "replica of 0"
    assert observer.events == [("http", "one"), 20, "closed"]


async def test_a_request_carries_what_the_call_knows() -> None:
    target = Target()
    texts = call("ab", pooling=Pooling.LAST)
    answer = await embeddings(target, Observer()).embed(texts, CONTEXT)
    assert target.requests == [
        EmbeddingRequest(
            request_id=f"{answer.request_id}-0",
            prompt_token_ids=(97, 98),
            pooling=Pooling.LAST,
            normalize=False,
            tenant="one",
            tenant_key=bytes(range(32)),
            priority=3,
            deadline=12.0,
            traceparent="00-1",
            avoid_replicas=("bad",),
        )
    ]


async def test_the_first_failure_ends_the_call_and_its_other_texts() -> None:
    target, observer = Target(fails_at=4, holds=True), Observer()
    with pytest.raises(EngineOverloadedError):
        await embeddings(target, observer).embed(call(*([i] for i in range(20))), CONTEXT)
    assert target.num_running == 0
    assert target.num_cancelled == len(target.requests) - 1
    assert observer.events == [("http", "one"), "failed", "closed"]


async def test_what_cannot_be_embedded_never_reaches_the_pool() -> None:
    target = Target()
    flow = embeddings(target, Observer(), max_embedding_inputs=2)
    with pytest.raises(RequestInvalidError, match="At most 2") as caught:
        await flow.embed(call("a", "b", "c"), CONTEXT)
    assert caught.value.param == "input"
    with pytest.raises(ContextLengthError, match="an input has 7 tokens"):
        await flow.embed(call("123456", "1234567"), CONTEXT)
    assert not target.requests


def test_base64_is_what_openais_client_reads() -> None:
    answer = EmbeddingAnswer(
        request_id="e",
        vectors=(np.array([0.5, -2.0], dtype=np.float32),),
        usage=GenerationUsage(num_prompt_tokens=3, num_output_tokens=0, num_cached_tokens=1),
        replica_id="r",
    )
    (item,) = embeddings_body(answer, "m", "float")["data"]
    assert item == {"object": "embedding", "index": 0, "embedding": [0.5, -2.0]}
    body = embeddings_body(answer, "m", "base64")
    data = base64.b64decode(body["data"][0]["embedding"])
    assert np.frombuffer(data, dtype="<f4").tolist() == [0.5, -2.0]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "total_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


async def test_an_engine_without_the_ability_says_so() -> None:
    class Replica(TargetReplica):
        def __init__(self) -> None:
            self._engine = SimpleNamespace()

        def __del__(self) -> None:
            """The hook is a coroutine."""

    with pytest.raises(RequestRejectedError, match="no embeddings"):
        await Replica().embed(EmbeddingRequest(request_id="e", prompt_token_ids=(1,)))
