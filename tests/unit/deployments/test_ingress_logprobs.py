"""Log probabilities through a whole ingress, over a real engine without a cluster."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from protos import inference_pb2 as pb
from tests.fakes_ingress import echo_ingress, http_client

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

    from tests.fakes_ingress import Replica

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "seed": 7}
PLAIN = {"model": "m", "prompt": "thé cat", "seed": 7}
ALL = {"max_tokens": 12, "n": 2, "logprobs": 2, "echo": True, "prompt_logprobs": 0}


@pytest.fixture
def ingress(tmp_path: Path) -> Replica:
    # Half of the tokens are parts of a character, so that texts and tokens do not keep step.
    return echo_ingress(tmp_path, alphabet="ab€")


async def ask(replica: Replica, fields: dict[str, Any]) -> httpx.Response:
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    async with http_client(replica) as http:
        return await http.post(path, json=fields)


async def whole(replica: Replica, fields: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = (await ask(replica, fields)).json()
    return answer


async def streamed(replica: Replica, fields: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (await ask(replica, fields | {"stream": True})).text.split("\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


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


async def test_a_prompt_can_be_scored_alone(ingress: Replica) -> None:
    asked = PLAIN | ALL
    choices = (await whole(ingress, asked))["choices"]
    answer = await whole(ingress, asked | {"max_tokens": 0})
    assert answer["usage"]["completion_tokens"] == 0
    for choice, longer in zip(answer["choices"], choices, strict=True):
        assert (choice["text"], choice["finish_reason"]) == (PLAIN["prompt"], "length")
        assert choice["prompt_logprobs"] == longer["prompt_logprobs"]
        for name, values in choice["logprobs"].items():
            assert values == longer["logprobs"][name][: len(choice["prompt_logprobs"])]
    events = await streamed(ingress, asked | {"max_tokens": 0})
    for index in range(2):
        mine = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in mine) == PLAIN["prompt"]
        assert [part["finish_reason"] for part in mine] == [None, "length"]


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
