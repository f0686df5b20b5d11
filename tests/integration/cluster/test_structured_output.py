"""Real weights over HTTP and gRPC: what is asked for in a form comes in it, drafted or not."""

from __future__ import annotations

import json
import re
import signal
from typing import TYPE_CHECKING, Any, Literal

import grpc
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from cluster.config import default_cache_dir
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from tests.integration.cluster.cluster_process import ClusterProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.integration

MODEL = "smollm2-135m-instruct"
CONFIG = """
server: {http_port: 0, grpc_port: 0}
engine: {max_model_len: 512, num_pages: 32}
pools: {draft: null}
kv: null
"""
ASKED = "Describe a cat as JSON with its name, its age in years and its colours."


class Cat(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=30)
    colours: list[Literal["black", "white", "red"]] = Field(min_length=1, max_length=3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    prepare_builtin(default_cache_dir(), print)
    folder = tmp_path_factory.mktemp("structured")
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    process = ClusterProcess(["-m", "cluster", "serve", "--config", str(config)], folder / "state")
    try:
        process.wait_for("serving until Ctrl-C")
        yield process
        process.signal(signal.SIGTERM)
        process.wait()
    finally:
        process.kill()


@pytest.fixture(scope="module")
def client(cluster: ClusterProcess) -> openai.OpenAI:
    url = f"{cluster.state.http_url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


def chat(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": ASKED}], max_tokens=120, **fields
    ).choices[0]


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_schema_is_kept_and_drafts_do_not_show(client: openai.OpenAI, temperature: int) -> None:
    schema = Cat.model_json_schema() | {"additionalProperties": False}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "cat", "schema": schema}}
    fields = {"response_format": wanted, "temperature": temperature, "seed": 5}
    drafted = chat(client, **fields)
    plain = chat(client, **fields, extra_body={"speculation": False})
    assert drafted.finish_reason == "stop"
    jsonschema.validate(json.loads(drafted.message.content), schema)
    assert drafted.message.content == plain.message.content


def test_the_client_parses_into_a_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": ASKED}],
        response_format=Cat,
        max_tokens=120,
        temperature=0,
    )
    assert isinstance(answer.choices[0].message.parsed, Cat)


def test_other_forms_and_bad_words(client: openai.OpenAI) -> None:
    choice = chat(client, extra_body={"structured_outputs": {"choice": ["a tabby", "a lion"]}})
    assert choice.message.content in {"a tabby", "a lion"}
    date = chat(client, extra_body={"structured_outputs": {"regex": r"\d{4}-\d{2}"}}, n=2)
    assert re.fullmatch(r"[0-9]{4}-[0-9]{2}", date.message.content)
    listed = chat(
        client,
        extra_body={"structured_outputs": {"grammar": 'root ::= "cat" (", cat"){1,3} "."'}},
    )
    assert re.fullmatch(r"cat(, cat){1,3}\.", listed.message.content)
    said = chat(client, temperature=0).message.content
    word = max(re.findall(r"[A-Za-z]+", said), key=len)
    unsaid = chat(client, temperature=0, extra_body={"bad_words": [word]}).message.content
    assert word not in unsaid


def test_a_wrong_schema_is_the_clients_fault(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "cat"}}}
    with pytest.raises(openai.BadRequestError, match="Invalid type: cat") as caught:
        chat(client, response_format=wanted)
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="Invalid type: cat"):
        chat(client, response_format=wanted, stream=True)


def test_grpc_keeps_a_form(cluster: ClusterProcess) -> None:
    sampling = pb.SamplingOptions(
        max_tokens=40, structured_output=pb.StructuredOutput(json_schema='{"type": "boolean"}')
    )
    request = pb.GenerateRequest(model=MODEL, text="Is it raining?", sampling=sampling, n=2)
    with grpc.insecure_channel(cluster.state.grpc_address) as channel:
        answer = pb_grpc.InferenceStub(channel).GenerateUnary(request, timeout=120)
        assert {choice.text for choice in answer.choices} <= {"true", "false"}
        request.sampling.structured_output.json_schema = "{"
        with pytest.raises(grpc.RpcError) as caught:
            pb_grpc.InferenceStub(channel).GenerateUnary(request, timeout=120)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
