"""Log probabilities through a whole ingress, over a real engine without a cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from deployments.config import AuthConfig, IngressConfig, TracingConfig
from deployments.engine.config import TorchEngineConfig
from deployments.ingress import IngressReplica
from deployments.openai_api import ChatCompletionRequest, CompletionRequest, parse_body
from protos import inference_pb2 as pb
from tests.fakes_echo_engine import EchoEngine
from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from deployments.engine.types import GenerationRequest, TokenDelta

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "seed": 7}
PLAIN = {"model": "m", "prompt": "thé cat", "seed": 7}
ALL = {"max_tokens": 12, "n": 2, "logprobs": 2, "echo": True, "prompt_logprobs": 0}


class Replica(IngressReplica):
    def __del__(self) -> None:
        """Not when it is collected: the hook is a coroutine."""


class Handle:
    """The handle of a target deployment whose replica is an engine of this process."""

    def __init__(self) -> None:
        self.engine: EchoEngine

    def options(self, **_: object) -> Handle:
        return self

    def remote(self, request: GenerationRequest) -> Stream:
        return Stream(self.engine.generate(request))


class Stream:
    """What a streaming call of a handle returns."""

    def __init__(self, deltas: AsyncIterator[TokenDelta]) -> None:
        self._deltas = deltas

    async def __aiter__(self) -> AsyncIterator[tuple[TokenDelta, ...]]:
        async for delta in self._deltas:
            yield (delta,)

    def cancel(self) -> None:
        """Nobody else runs here."""


@pytest.fixture
def ingress(tmp_path: Path) -> Replica:
    handle = Handle()
    replica = Replica(
        handle,
        engine=TorchEngineConfig(
            model=str(write_tokenizer(tmp_path / "model")), served_model_name="m"
        ),
        cache_dir=tmp_path,
        config=IngressConfig(),
        auth=AuthConfig(),
        tracing=TracingConfig(),
    )
    tokenizer = replica._tokenizer
    # Half of the tokens are parts of a character, so that texts and tokens do not keep step.
    handle.engine = EchoEngine(vocabulary=tokenizer.encode("ab" + "€"), decode=tokenizer.decode)
    return replica


async def whole(replica: Replica, fields: dict[str, Any]) -> dict[str, Any]:
    kind = ChatCompletionRequest if "messages" in fields else CompletionRequest
    body = parse_body(json.dumps(fields).encode(), kind)
    answer: dict[str, Any] = json.loads((await replica._whole_answer({}, body)).body)
    return answer


async def streamed(replica: Replica, fields: dict[str, Any]) -> list[dict[str, Any]]:
    kind = ChatCompletionRequest if "messages" in fields else CompletionRequest
    body = parse_body(json.dumps(fields | {"stream": True}).encode(), kind)
    data = b"".join([event async for event in replica._events({}, body)])
    lines = [line[6:] for line in data.decode().split("\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


async def test_completions_tell_the_same_streamed_and_whole(ingress: Replica) -> None:
    choices = (await whole(ingress, PLAIN | ALL))["choices"]
    events = await streamed(ingress, PLAIN | ALL)
    for index, choice in enumerate(choices):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in mine) == choice["text"]
        assert choice["text"].startswith("thé cat")
        for name, values in choice["logprobs"].items():
            parts = [part["logprobs"][name] for part in mine if part["logprobs"] is not None]
            assert [value for part in parts for value in part] == values
        assert mine[0]["prompt_logprobs"] == choice["prompt_logprobs"]
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert any(token.startswith("bytes:") for token in choice["logprobs"]["tokens"])
        assert len(choice["logprobs"]["tokens"]) == len(choice["prompt_logprobs"]) + 12


async def test_chats_tell_the_same_streamed_and_whole(ingress: Replica) -> None:
    asked = {"max_tokens": 12, "logprobs": True, "top_logprobs": 3}
    choice = (await whole(ingress, CHAT | asked))["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 12
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    data = b"".join(bytes(entry["bytes"]) for entry in content)
    assert data.decode(errors="replace") == choice["message"]["content"]
    parts = [event["choices"][0] for event in await streamed(ingress, CHAT | asked)]
    told = [part["logprobs"]["content"] for part in parts if part["logprobs"] is not None]
    assert [entry for part in told for entry in part] == content
    for part in parts:
        # Whoever reads a chunk's log probabilities has its text as well.
        if part["logprobs"] is not None and part["finish_reason"] is None:
            assert part["delta"]["content"]


async def test_tokens_hidden_by_a_stop_string_are_not_told(ingress: Replica) -> None:
    asked = CHAT | {"max_tokens": 200, "logprobs": True}
    text = (await whole(ingress, asked))["choices"][0]["message"]["content"]
    stop = text[5:8]
    choice = (await whole(ingress, asked | {"stop": stop}))["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    data = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert data.decode(errors="replace") == choice["message"]["content"]


async def test_nothing_is_told_that_was_not_asked_for(ingress: Replica) -> None:
    answer = await whole(ingress, CHAT | {"max_tokens": 3})
    assert answer["choices"][0]["logprobs"] is None
    assert "prompt_logprobs" not in answer
    options = pb.SamplingOptions(max_tokens=3)
    request = pb.GenerateRequest(model="m", text="x", sampling=options)
    async for chunk in ingress.Generate(request, Context()):
        assert not chunk.logprobs
        assert not chunk.prompt_logprobs


class Context:
    """As much of a gRPC context as an ingress needs."""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return []


async def test_grpc_tells_what_http_tells(ingress: Replica) -> None:
    choices = (await whole(ingress, PLAIN | ALL))["choices"]
    options = pb.SamplingOptions(seed=7, max_tokens=12, logprobs=2, prompt_logprobs=2)
    request = pb.GenerateRequest(model="m", text="thé cat", n=2, sampling=options)
    unary = await ingress.GenerateUnary(request, Context())
    chunks = [chunk async for chunk in ingress.Generate(request, Context())]
    prompt = list(unary.prompt_logprobs)
    assert not prompt[0].HasField("logprob")
    for index, choice in enumerate(choices):
        output = list(unary.choices[index].logprobs)
        assert [entry.logprob for entry in (*prompt[1:], *output)] == choice["logprobs"][
            "token_logprobs"
        ][1:]
        data = b"".join(entry.token for entry in (*prompt, *output))
        assert data.decode(errors="replace") == choice["text"]
        assert all(len(entry.top) == 2 and entry.rank for entry in output)
        mine = [chunk for chunk in chunks if chunk.choice_index == index]
        assert [entry for chunk in mine for entry in chunk.logprobs] == output
        assert [entry for chunk in mine for entry in chunk.prompt_logprobs] == prompt
