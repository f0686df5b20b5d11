"""Both surfaces over a real Ray with HAProxy, two target replicas and the small test engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import openai
import pytest
from pydantic import SecretStr

from cluster.load.run import LoadTest
from cluster.load.summary import Slo
from cluster.load.surfaces import surfaces
from cluster.load.workload import LoadRequest
from deployments.config import AuthConfig, IngressConfig, TenantConfig
from deployments.engine.prefixes import prefix_names
from deployments.grpc_servicers import GRPC_SERVICERS
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from tests.echo_deployments import MODEL, echo_app
from tests.fakes_tokenizer import write_tokenizer
from tests.ray_cluster import Broadcaster, Ports, ray_serve, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

KEY = "integration-key"
AUTH = {"authorization": f"Bearer {KEY}"}
PROMPT = {"model": MODEL, "prompt": "the cat", "seed": 7}
PATIENT_S = 120.0
LONG = 2500
LEFT_S = 45.0
"""Less than the 50 s that ``LONG`` tokens take at least."""


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    folder = write_tokenizer(tmp_path_factory.mktemp("model"))
    config = {"model_type": "llama", "max_position_embeddings": 3072}
    (folder / "config.json").write_text(json.dumps(config))
    haproxy = os.environ.get("PACELINE_TEST_PROXY", "haproxy") == "haproxy"
    with ray_serve(GRPC_SERVICERS, haproxy=haproxy) as started:
        from ray import serve

        auth = AuthConfig(
            cluster_secret=SecretStr("a cluster secret of some length"),
            tenants=(TenantConfig(name="one", api_keys=(SecretStr(KEY),)),),
        )
        limits = IngressConfig(max_body_bytes=8192, max_prompt_chars=4096)

        def deploy(num_targets: int) -> None:
            app = echo_app(folder, auth=auth, ingress=limits, num_targets=num_targets)
            serve.run(app, name="paceline")

        deploy(2)
        _DEPLOY.append(deploy)
        _BROADCASTERS.append(Broadcaster("paceline"))
        yield started


@pytest.fixture
def http(ports: Ports) -> Iterator[httpx.Client]:
    url = f"http://127.0.0.1:{ports.http}"
    with httpx.Client(base_url=url, headers=AUTH, timeout=PATIENT_S) as client:
        yield client


@pytest.fixture
def sdk(ports: Ports) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{ports.http}/v1", api_key=KEY, max_retries=0, timeout=PATIENT_S
    )


@pytest.fixture
def rpc(ports: Ports) -> Iterator[pb_grpc.InferenceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        yield pb_grpc.InferenceStub(channel)


_BROADCASTERS: list[Broadcaster] = []
_DEPLOY: list[Callable[[int], None]] = []

METADATA = (("authorization", f"Bearer {KEY}"),)


def replicas() -> dict[str, tuple[int, int]]:
    """Replica id -> (process id, running sequences)."""
    return {name: (pid, running) for name, pid, running, _ in broadcast("target")}


def broadcast(deployment: str) -> list[Any]:
    """What every living replica says of itself; nothing while one of them is dying."""
    # Ray must not be imported before the cluster's environment is set.
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        return _BROADCASTERS[-1](deployment, "where")
    except (RayError, RayServeException, grpc.RpcError, TimeoutError):
        return []


def test_the_openai_sdk_gets_a_whole_answer(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=6, seed=1
    )
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].message.content or "") == 6
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_the_openai_sdk_takes_a_second_turn(sdk: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    answer = sdk.chat.completions.create(model=MODEL, messages=messages, max_tokens=6)
    message = answer.choices[0].message
    for turn in (message, message.model_dump()):
        again = [*messages, turn, {"role": "user", "content": "go on"}]
        sdk.chat.completions.create(model=MODEL, messages=again, max_tokens=1)


def test_the_openai_sdk_streams_the_same_text(sdk: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 6,
        "seed": 1,
    }
    whole = sdk.chat.completions.create(**arguments)
    chunks = list(
        sdk.chat.completions.create(
            **arguments, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_alternatives_without_log_probabilities_are_refused(sdk: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi"}]
    with pytest.raises(openai.BadRequestError, match="only allowed when 'logprobs'") as caught:
        sdk.chat.completions.create(model=MODEL, messages=messages, top_logprobs=2)
    assert caught.value.param == "top_logprobs"


def test_both_surfaces_embed(
    http: httpx.Client, sdk: openai.OpenAI, rpc: pb_grpc.InferenceStub
) -> None:
    texts = [f"{letter} cat" for letter in "abcdefghijkl"]
    answer = http.post("/v1/embeddings", json={"model": MODEL, "input": texts}).json()
    vectors = [item["embedding"] for item in answer["data"]]
    assert [vector[0] for vector in vectors] == [5.0] * 12
    assert len({vector[1] for vector in vectors}) == 12
    assert answer["usage"]["total_tokens"] == 60
    # The SDK asks for base64.
    by_sdk = sdk.embeddings.create(model=MODEL, input=texts)
    assert [item.embedding for item in by_sdk.data] == vectors
    inputs = [pb.EmbedInput(text=text) for text in texts]
    by_rpc = rpc.Embed(
        pb.EmbedRequest(model=MODEL, inputs=inputs), metadata=METADATA, timeout=PATIENT_S
    )
    assert [list(item.values) for item in by_rpc.embeddings] == vectors
    assert by_rpc.usage.prompt_tokens == 60
    last = http.post(
        "/v1/embeddings", json={"model": MODEL, "input": [5, 6, 7], "pooling": "last"}
    ).json()
    assert last["data"][0]["embedding"] == [3.0, 5.0, 1.0]
    refused = http.post("/v1/embeddings", json={"model": MODEL, "input": "a", "dimensions": 2})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "dimensions")
    assert http.post("/v1/embeddings", json={"model": "no", "input": "a"}).status_code == 404


def test_choices_are_streamed_side_by_side(http: httpx.Client) -> None:
    body = PROMPT | {"n": 4, "max_tokens": 60}
    whole = http.post("/v1/completions", json=body).json()
    texts = [choice["text"] for choice in whole["choices"]]
    assert len(set(texts)) == 4
    assert whole["usage"]["completion_tokens"] == 240
    streamed = [""] * 4
    order: list[int] = []
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                streamed[choice["index"]] += choice["text"]
                order.append(choice["index"])
    assert streamed == texts
    assert order != sorted(order)


def test_both_surfaces_give_the_same_text(http: httpx.Client, rpc: pb_grpc.InferenceStub) -> None:
    over_http = http.post("/v1/completions", json=PROMPT | {"max_tokens": 12}).json()
    request = pb.GenerateRequest(
        model=MODEL, text="the cat", sampling=pb.SamplingOptions(seed=7, max_tokens=12)
    )
    unary = rpc.GenerateUnary(request, metadata=METADATA, timeout=PATIENT_S)
    chunks = list(rpc.Generate(request, metadata=METADATA, timeout=PATIENT_S))
    assert unary.choices[0].text == over_http["choices"][0]["text"]
    assert "".join(chunk.text for chunk in chunks) == unary.choices[0].text
    assert chunks[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert chunks[-1].usage.completion_tokens == 12
    assert [chunk.HasField("usage") for chunk in chunks[:-1]] == [False] * (len(chunks) - 1)


def test_stop_strings_end_the_text_before_them(http: httpx.Client) -> None:
    full = http.post("/v1/completions", json=PROMPT | {"max_tokens": 40}).json()
    text = full["choices"][0]["text"]
    stop = text[10:12]
    cut = http.post("/v1/completions", json=PROMPT | {"max_tokens": 40, "stop": stop}).json()
    assert cut["choices"][0]["text"] == text[: text.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "code"),
    [
        ("/v1/completions", {"model": "other"}, 404, None, "model_not_found"),
        ("/v1/completions", {"temperature": 3}, 400, "temperature", None),
        ("/v1/completions", {"prompt": "x" * 5000}, 400, "prompt", "request_too_large"),
        ("/v1/completions", {"prompt": "x" * 3500}, 400, "prompt", "context_length_exceeded"),
        ("/v1/completions", {"prompt": "x" * 9000}, 400, None, "request_too_large"),
        ("/v1/completions", {"prompt": [9999]}, 400, "prompt", None),
        ("/v1/completions", {"logprobs": 6}, 400, "logprobs", None),
        ("/v1/completions", {"top_logprobs": 1}, 400, "top_logprobs", "unsupported_parameter"),
        ("/v1/completions", {"frobnicate": 1}, 400, "frobnicate", None),
        ("/v1/chat/completions", {"messages": [], "prompt": None}, 400, None, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_have_openais_shape(
    http: httpx.Client,
    path: str,
    fields: dict[str, Any],
    status: int,
    param: str | None,
    code: str | None,
    *,
    stream: bool,
) -> None:
    response = http.post(path, json=PROMPT | fields | {"stream": stream})
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic xyz"])
def test_strangers_are_refused_on_both_surfaces(
    ports: Ports, rpc: pb_grpc.InferenceStub, header: str | None
) -> None:
    headers = {} if header is None else {"authorization": header}
    url = f"http://127.0.0.1:{ports.http}"
    for response in (
        httpx.post(f"{url}/v1/completions", json=PROMPT, headers=headers, timeout=PATIENT_S),
        httpx.get(f"{url}/v1/models", headers=headers, timeout=PATIENT_S),
    ):
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(grpc.RpcError) as caught:
        rpc.ModelInfo(pb.ModelInfoRequest(), metadata=tuple(headers.items()), timeout=PATIENT_S)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


def test_broken_bodies_and_wrong_urls(http: httpx.Client) -> None:
    broken = http.post("/v1/completions", content=b"{")
    assert (broken.status_code, broken.json()["error"]["type"]) == (400, "invalid_request_error")
    missing = http.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    wrong = http.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("unary", [True, False])
def test_grpc_errors_carry_code_and_detail(rpc: pb_grpc.InferenceStub, *, unary: bool) -> None:
    request = pb.GenerateRequest(model=MODEL, text="x", sampling=pb.SamplingOptions(top_p=7))

    def call() -> object:
        if unary:
            return rpc.GenerateUnary(request, metadata=METADATA, timeout=PATIENT_S)
        return list(rpc.Generate(request, metadata=METADATA, timeout=PATIENT_S))

    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "top_p" in error.details()
    assert ("x-paceline-error-param", "top_p") in [
        tuple(item) for item in error.trailing_metadata()
    ]


def test_the_deadline_ends_a_request(http: httpx.Client) -> None:
    response = http.post(
        "/v1/completions", json=PROMPT | {"max_tokens": LONG}, headers={"x-paceline-timeout": "0.3"}
    )
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_a_deadline_in_the_middle_of_a_stream_is_an_error_event(sdk: openai.OpenAI) -> None:
    stream = sdk.completions.create(
        **PROMPT,
        max_tokens=LONG,
        stream=True,
        extra_headers={"x-paceline-timeout": "4"},  # its beginning must come sooner
    )
    with pytest.raises(openai.APIError, match="deadline"):
        list(stream)


def test_an_operator_can_avoid_a_replica(http: httpx.Client) -> None:
    wait_until(lambda: len(replicas()) == 2, what="two target replicas")
    first = http.post("/v1/completions", json=PROMPT | {"max_tokens": 2})
    used = first.headers["x-paceline-replica"]
    wait_until(lambda: used in replicas(), what="the replica that answered")
    for _ in range(4):
        other = http.post(
            "/v1/completions",
            json=PROMPT | {"max_tokens": 2},
            headers={"x-paceline-avoid-replica": used},
        )
        assert other.headers["x-paceline-replica"] not in {"", used}
        assert other.json()["choices"] == first.json()["choices"]


def test_a_known_prefix_goes_to_the_replica_that_has_it(http: httpx.Client) -> None:
    wait_until(lambda: len(replicas()) == 2, what="two target replicas")
    prompt = "a long prompt of its own " * 20
    used = {
        http.post(
            "/v1/completions", json={"model": MODEL, "prompt": prompt + str(n), "max_tokens": 1}
        ).headers["x-paceline-replica"]
        for n in range(8)
    }
    assert len(used) == 1


def test_a_prompt_goes_to_the_replica_that_reports_its_beginning(http: httpx.Client) -> None:
    wait_until(lambda: len(replicas()) == 2, what="two target replicas")
    holder = min(replicas())
    prompts = [[10 + n // 60, 10 + n % 60, *range(10, 73)] for n in range(3600)]
    names = [name for prompt in prompts for name in prefix_names("one", prompt)]
    assert len(names) == len(prompts)
    # Each is asked once, so that no router has sent it anywhere.
    unasked = iter(prompts)

    def all_go_there() -> bool:
        return all(
            http.post(
                "/v1/completions",
                json={"model": MODEL, "prompt": next(unasked), "max_tokens": 1},
            ).headers["x-paceline-replica"]
            == holder
            for _ in range(24)
        )

    _BROADCASTERS[-1]("target", "hold", holder, names)
    wait_until(all_go_there, what="prompts at the replica that reports them")
    _BROADCASTERS[-1]("target", "hold", holder, [])
    wait_until(lambda: not all_go_there(), what="prompts elsewhere")


def test_the_request_id_comes_back(http: httpx.Client) -> None:
    response = http.get("/v1/models", headers={"x-request-id": "mine-1"})
    assert response.headers.get_list("x-request-id") == ["mine-1"]
    assert response.json()["data"][0]["id"] == MODEL


def test_health_needs_no_key(ports: Ports) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    health = httpx.get(f"http://127.0.0.1:{ports.http}/health", timeout=PATIENT_S)
    assert health.json() == {"status": "ok"}
    with grpc.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="paceline.v1.Inference")
        assert (
            stub.Check(request, timeout=PATIENT_S).status == health_pb2.HealthCheckResponse.SERVING
        )
        watch = stub.Watch(request, timeout=PATIENT_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nope"), timeout=PATIENT_S)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_reflection_lists_the_services(ports: Ports) -> None:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )

    with grpc.insecure_channel(f"127.0.0.1:{ports.grpc}") as channel:
        services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"paceline.v1.Inference", "grpc.health.v1.Health"} <= services


def num_running() -> int:
    """Sequences in all target replicas; -1 while they cannot be asked."""
    running = [running for _, running in replicas().values()]
    return sum(running) if running else -1


def test_a_client_that_leaves_frees_its_sequences(http: httpx.Client) -> None:
    wait_until(lambda: num_running() == 0, what="idle")
    body = PROMPT | {"max_tokens": LONG, "n": 3, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: a collected generator closes the response
        next(lines)
        wait_until(lambda: num_running() == 3, what="three running sequences")
    wait_until(lambda: num_running() == 0, timeout_s=LEFT_S, what="sequences end with their client")


def test_a_client_that_leaves_before_its_whole_answer(ports: Ports) -> None:
    body = json.dumps(PROMPT | {"max_tokens": LONG}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", ports.http)) as client:
        # In one packet: if the body comes later, HAProxy 2.8 misses a client that leaves before the
        # response begins, and the sequence runs until its end or its deadline.
        client.sendall(head.encode() + body)
        wait_until(lambda: num_running() == 1, what="one running sequence")
    wait_until(
        lambda: num_running() == 0, timeout_s=LEFT_S, what="the sequence ends with its client"
    )


def test_a_late_error_still_has_its_status(http: httpx.Client) -> None:
    response = http.post(
        "/v1/completions",
        json=PROMPT | {"max_tokens": LONG},
        headers={"x-paceline-timeout": "3.5"},
    )
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "timeout_error"


def test_a_cancelled_rpc_frees_its_sequences(rpc: pb_grpc.InferenceStub) -> None:
    request = pb.GenerateRequest(
        model=MODEL, text="the cat", n=2, sampling=pb.SamplingOptions(max_tokens=LONG)
    )
    call = rpc.Generate(request, metadata=METADATA, timeout=PATIENT_S)
    next(call)
    wait_until(lambda: num_running() == 2, what="two running sequences")
    call.cancel()
    wait_until(lambda: num_running() == 0, timeout_s=LEFT_S, what="sequences end with their client")


def num_attached() -> int:
    """Sequences that hold a draft replica; -1 while the targets cannot be asked."""
    attached = [attached for _, _, _, attached in broadcast("target")]
    return sum(attached) if attached else -1


def test_a_sequence_holds_a_draft_replica_and_outlives_it(http: httpx.Client) -> None:
    wait_until(lambda: len(broadcast("draft")) == 2, what="two draft replicas")
    body = PROMPT | {"max_tokens": LONG, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        wait_until(lambda: num_attached() == 1, what="a draft replica is held")
        wait_until(
            lambda: max([n for _, n in broadcast("draft")], default=0) == 1, what="it drafts"
        )
        busy = [pid for pid, num_sessions in broadcast("draft") if num_sessions]
        for pid in busy:
            os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: (
                num_attached() == 1 and any(n for pid, n in broadcast("draft") if pid not in busy)
            ),
            what="another draft replica is held",
        )
        assert any(line.startswith("data: {") for line in lines)
    wait_until(lambda: num_attached() == 0, timeout_s=LEFT_S, what="the slot is given back")


def test_speculation_can_be_left_out_by_a_request(http: httpx.Client) -> None:
    body = PROMPT | {"max_tokens": LONG, "stream": True, "speculation": False}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: a collected generator closes the response
        next(lines)
        wait_until(lambda: num_running() == 1, what="one running sequence")
        assert num_attached() == 0


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_replica_that_dies_in_the_middle_changes_nothing(
    http: httpx.Client, attempt: int
) -> None:
    wait_until(lambda: len(replicas()) == 2, what="two target replicas")
    body = PROMPT | {"max_tokens": 300, "seed": 11, "n": 2, "logprobs": 0, "echo": True}
    expected = http.post("/v1/completions", json=body).json()["choices"]
    texts = ["", ""]
    logprobs: list[list[float | None]] = [[], []]
    killed = threading.Event()
    with http.stream(
        "POST",
        "/v1/completions",
        json=body | {"stream": True, "stream_options": {"include_usage": True}},
    ) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event
            if event.get("metrics"):
                assert event["usage"]["completion_tokens"] == 600
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
                told = choice["logprobs"] or {"token_logprobs": []}
                logprobs[choice["index"]] += told["token_logprobs"]
            if min(map(len, texts)) > 27 and not killed.is_set():
                killed.set()
                wait_until(lambda: num_running() > 0, what="the replicas can be asked")
                busy = [pid for pid, running in replicas().values() if running]
                assert busy, "the text was too short to kill anything in its middle"
                for pid in busy:
                    os.kill(pid, signal.SIGKILL)
    assert killed.is_set()
    assert texts == [choice["text"] for choice in expected]
    assert logprobs == [choice["logprobs"]["token_logprobs"] for choice in expected]


def test_a_dead_engine_takes_no_traffic(http: httpx.Client, ports: Ports) -> None:
    wait_until(lambda: len(replicas()) == 2, what="two target replicas")
    body = PROMPT | {"prompt": "the engine of this prompt dies " * 20, "max_tokens": 5}
    first = http.post("/v1/completions", json=body)
    holder = first.headers["x-paceline-replica"]
    _BROADCASTERS[-1]("target", "kill_engine", holder)
    # Until Serve has replaced it, it looks idle and holds the prompt.
    for _ in range(5):
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200
        assert answer.json()["choices"] == first.json()["choices"]
        assert answer.headers["x-paceline-replica"] != holder
    health = httpx.get(f"http://127.0.0.1:{ports.http}/health", timeout=PATIENT_S)
    assert health.status_code == 200
    wait_until(lambda: len(replicas()) == 2 and holder not in replicas(), what="replaced")


def test_a_replica_that_is_scaled_in_finishes_what_it_began(http: httpx.Client) -> None:
    wait_until(lambda: len(replicas()) == 2, what="two target replicas")
    bodies = [PROMPT | {"prompt": f"{n} " * 70, "max_tokens": 400, "seed": n} for n in range(4)]

    def ask(body: dict[str, Any]) -> Any:
        return http.post("/v1/completions", json=body).json()["choices"]

    with ThreadPoolExecutor(len(bodies)) as clients:
        expected = list(clients.map(ask, bodies))
        asking = [clients.submit(ask, body) for body in bodies]
        # Where this takes longer than the answers, there is nothing left to see.
        wait_until(
            lambda: num_running() == len(bodies) or any(each.done() for each in asking),
            what="all of them run",
        )
        _DEPLOY[-1](1)
        try:
            assert [each.result() for each in asking] == expected
            wait_until(lambda: len(replicas()) == 1, what="one target replica")
        finally:
            _DEPLOY[-1](2)  # the tests run in any order


async def test_load_goes_through_both_surfaces_and_is_counted_alike(ports: Ports):
    asked = [
        LoadRequest(
            at_s=number / 40,
            # Text on the one surface is text on the other, and so are ids.
            prompt="the cat" if number % 4 < 2 else (5, 6, 7, 8),
            max_tokens=6,
            ignore_eos=True,
        )
        for number in range(40)
    ]
    through = surfaces(
        ("http", "grpc"),
        http_url=f"http://127.0.0.1:{ports.http}",
        grpc_address=f"127.0.0.1:{ports.grpc}",
        model=MODEL,
        api_key=KEY,
        temperature=0.0,
    )
    test = LoadTest(
        schedule=asked, surfaces=through, slo=Slo(), timeout_s=PATIENT_S, max_in_flight=100
    )
    report, outcomes = await test.run(lambda _: None)
    assert [outcome.error for outcome in outcomes] == [None] * 40
    assert report["all"]["num_good"] == 40
    for name in ("http", "grpc"):
        own = report["surfaces"][name]
        assert (own["num_complete"], own["num_output_tokens"]) == (20, 120)
    by_ids = [each for each in outcomes if each.index % 4 >= 2]
    assert {each.num_prompt_tokens for each in by_ids} == {4}


async def test_load_with_a_wrong_key_fails_on_both_surfaces(ports: Ports):
    asked = [LoadRequest(at_s=0, prompt="a", max_tokens=2, ignore_eos=False)] * 2
    through = surfaces(
        ("http", "grpc"),
        http_url=f"http://127.0.0.1:{ports.http}",
        grpc_address=f"127.0.0.1:{ports.grpc}",
        model=MODEL,
        api_key="wrong",
        temperature=0.0,
    )
    test = LoadTest(
        schedule=asked, surfaces=through, slo=Slo(), timeout_s=PATIENT_S, max_in_flight=100
    )
    report, outcomes = await test.run(lambda _: None)
    assert report["all"]["num_failed"] == 2
    assert "401" in str(outcomes[0].error)
    assert "UNAUTHENTICATED" in str(outcomes[1].error)
