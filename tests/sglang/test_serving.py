"""The real SGLang on a CPU in a target replica of a real cluster, beside the embedded engine.

``make test-sglang`` builds SGLang's environment and runs this. The cluster's own environment, in
which these tests and the ingress run, holds no SGLang.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import openai
import pytest

from cluster.metrics_reader import MetricsSnapshot
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.engine.types import GenerationRequest, SamplingParams
from deployments.tokenizer import ChatTurn, Tokenizer
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from tests.exactness import Reference, assert_same_text
from tests.integration.cluster.cluster_process import ClusterProcess, still_running
from tests.integration.test_torch_engine_parity import QUESTIONS
from tests.otlp_receiver import OtlpReceiver, ancestors
from tests.ray_cluster import wait_until
from tests.sglang.embedded import by_the_embedded_engine
from tests.sglang.served import tier_pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import psutil

PYTHON = os.environ.get("SGLANG_PYTHON")

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PYTHON is None, reason="make test-sglang runs it"),
]

MODEL = "smollm2"
MAX_TOKENS = 48
START_TIMEOUT_S = 420
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_ID = "b7ad6b7169203331"


@pytest.fixture(scope="module")
def cluster(
    folder: Path, receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClusterProcess]:
    place = tmp_path_factory.mktemp("cluster")
    engine = {
        "kind": "sglang",
        "model": str(folder),
        "served_model_name": MODEL,
        "max_model_len": 1024,
        "num_pages": 64,
        "max_num_seqs": 4,
        "max_waiting": 16,
        "kv_load_timeout_s": 30,
        "sglang": {"python": PYTHON, "attention_backend": "torch_native"},
    }
    settings = {
        "server": {"http_port": 0, "grpc_port": 0, "start_timeout_s": START_TIMEOUT_S},
        "engine": engine,
        "pools": {"draft": None},
        "kv": {"tiers": [{"kind": "embedded_valkey", "name": "hot", "operation_timeout_s": 10}]},
        "tracing": {"exporter": "otlp", "otlp_endpoint": receiver.endpoint},
    }
    config = place / "config.yaml"
    config.write_text(json.dumps(settings))
    process = ClusterProcess(["-m", "cluster", "serve", "--config", str(config)], place / "state")
    try:
        process.wait_for("serving until Ctrl-C", START_TIMEOUT_S)
        yield process
    finally:
        process.kill()


@pytest.fixture(scope="module")
def client(cluster: ClusterProcess) -> openai.OpenAI:
    url = f"{cluster.state.http_url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def rpc(cluster: ClusterProcess) -> Iterator[pb_grpc.InferenceStub]:
    with grpc.insecure_channel(cluster.state.grpc_address) as channel:
        yield pb_grpc.InferenceStub(channel)


def chat(client: openai.OpenAI, question: str, **fields: Any) -> Any:
    arguments = {"temperature": 0, "max_tokens": MAX_TOKENS} | fields
    messages: Any = [{"role": "user", "content": question}]
    return client.chat.completions.create(model=MODEL, messages=messages, **arguments)


def ask(rpc: pb_grpc.InferenceStub, question: str, **sampling: float) -> pb.Choice:
    messages = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=question)])
    options = pb.SamplingOptions(max_tokens=MAX_TOKENS, **sampling)
    request = pb.GenerateRequest(model=MODEL, chat=messages, sampling=options)
    return rpc.GenerateUnary(request, timeout=600).choices[0]


def sglang_processes(cluster: ClusterProcess) -> list[psutil.Process]:
    return [process for process in cluster.processes() if process.name().startswith("sglang::")]


def test_both_surfaces_give_the_embedded_engines_text(
    client: openai.OpenAI, rpc: pb_grpc.InferenceStub, folder: Path
) -> None:
    tokenizer = Tokenizer.load(folder)
    requests = [
        GenerationRequest(
            request_id=f"q{number}",
            prompt_token_ids=tuple(tokenizer.encode_chat([ChatTurn("user", question)])),
            sampling=SamplingParams(max_tokens=MAX_TOKENS, seed=0, temperature=0.0),
        )
        for number, question in enumerate(QUESTIONS)
    ]

    def over_grpc(question: str) -> pb.Choice:
        return ask(rpc, question, temperature=0.0)

    with ThreadPoolExecutor(8) as threads:
        choices = list(threads.map(over_grpc, QUESTIONS))
        answers = list(threads.map(lambda question: chat(client, question), QUESTIONS))
    expected = asyncio.run(by_the_embedded_engine(requests, folder, tokenizer))
    actual = {
        request.request_id: list(choice.token_ids)
        for request, choice in zip(requests, choices, strict=True)
    }
    assert sum(map(len, actual.values())) > 10 * MAX_TOKENS
    assert_same_text(Reference(default_cache_dir()), requests, expected, actual)
    for choice, answer in zip(choices, answers, strict=True):
        assert answer.choices[0].message.content == choice.text


def test_a_seed_gives_the_embedded_engines_text_whoever_else_is_served(
    rpc: pb_grpc.InferenceStub, folder: Path
) -> None:
    tokenizer = Tokenizer.load(folder)
    samplings: list[dict[str, Any]] = [
        {"temperature": 0.8, "top_p": 0.9, "seed": 7},
        {"temperature": 1.0, "top_k": 20, "seed": 2**63 - 1},
        {"temperature": 0.7, "min_p": 0.05, "seed": 9},
        {"temperature": 0.0, "seed": 1},
    ]
    asked = [(question, samplings[n % 4]) for n, question in enumerate(QUESTIONS[:12])]
    with ThreadPoolExecutor(4) as threads:
        choices = list(threads.map(lambda one: ask(rpc, one[0], **one[1]), asked))
    requests = [
        GenerationRequest(
            request_id=question,
            prompt_token_ids=tuple(tokenizer.encode_chat([ChatTurn("user", question)])),
            sampling=SamplingParams(max_tokens=MAX_TOKENS, **sampling),
        )
        for question, sampling in asked
    ]
    expected = asyncio.run(by_the_embedded_engine(requests, folder, tokenizer))
    actual = {
        request.request_id: list(choice.token_ids)
        for request, choice in zip(requests, choices, strict=True)
    }
    assert sum(map(len, actual.values())) > 6 * MAX_TOKENS
    assert_same_text(Reference(default_cache_dir()), requests, expected, actual)


def test_a_stream_is_the_whole_text_and_a_repeated_prompt_is_cached(
    client: openai.OpenAI,
) -> None:
    # Prefixes are kept in pages of 64 tokens.
    question = "Name three rivers of Europe and the seas they flow into. " * 12
    whole = chat(client, question)
    stream = chat(client, question, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].message.content
    assert len([text for text in texts if text]) > 5
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens > 0.5 * usage.prompt_tokens


def test_a_stop_string_ends_the_text_before_itself(client: openai.OpenAI) -> None:
    question = "Count from one to ten in words."
    whole = chat(client, question).choices[0].message.content
    stop = whole[20:24]
    answer = chat(client, question, stop=[stop]).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.content == whole[: whole.index(stop)]


def test_log_probabilities_are_the_models_whatever_the_temperature(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 8, "seed": 3}
    cold = chat(client, QUESTIONS[0], **asked).choices[0].logprobs.content
    warm = chat(client, QUESTIONS[0], temperature=0.3, **asked).choices[0].logprobs.content
    assert len(cold) == 8
    for entry in cold:
        assert entry.logprob == entry.top_logprobs[0].logprob
        assert len(entry.top_logprobs) == 3
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6
    # The first row is that of the same prompt.
    assert [top.token for top in warm[0].top_logprobs] == [
        top.token for top in cold[0].top_logprobs
    ]
    assert [top.logprob for top in warm[0].top_logprobs] == pytest.approx(
        [top.logprob for top in cold[0].top_logprobs], abs=1e-3
    )


def test_a_prompt_is_scored_alone_as_it_is_before_an_output(client: openai.OpenAI) -> None:
    alone, before = (
        client.completions.create(
            model=MODEL, prompt=QUESTIONS[0], echo=True, logprobs=2, max_tokens=limit
        )
        for limit in (0, 1)
    )
    choice = alone.choices[0]
    assert (choice.text, choice.finish_reason) == (QUESTIONS[0], "length")
    assert alone.usage is not None
    assert alone.usage.completion_tokens == 0
    told, longer = choice.logprobs, before.choices[0].logprobs
    assert told is not None
    assert longer is not None
    assert told.tokens == (longer.tokens or [])[:-1]
    assert (told.token_logprobs or [])[1:] == pytest.approx(
        (longer.token_logprobs or [])[1:-1], abs=1e-3
    )


def test_an_output_has_the_form_that_is_asked_for(client: openai.OpenAI) -> None:
    number = chat(client, "A number?", extra_body={"structured_outputs": {"regex": "[0-9]{4}"}})
    assert re.fullmatch("[0-9]{4}", number.choices[0].message.content)
    chosen = chat(client, "Yes?", extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert chosen.choices[0].message.content in {"yes", "no"}
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "age", "schema": schema}}
    answer = chat(client, "How old is a cat?", response_format=form).choices[0].message.content
    assert 0 <= json.loads(answer)["age"] <= 99


def test_what_cannot_be_served_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="repetition"):
        chat(client, "hi", extra_body={"repetition_penalty": 1.2})
    with pytest.raises(openai.BadRequestError, match="regex"):
        chat(client, "hi", extra_body={"structured_outputs": {"regex": "(("}})
    with pytest.raises(openai.BadRequestError, match="no embeddings"):
        client.embeddings.create(model=MODEL, input="a text")
    with pytest.raises(openai.BadRequestError, match="context"):
        chat(client, "word " * 1100)
    assert chat(client, "hi", max_tokens=2).usage.completion_tokens == 2


def test_a_client_that_leaves_ends_its_request(client: openai.OpenAI) -> None:
    streams = [
        chat(client, QUESTIONS[3], max_tokens=900, stream=True, extra_body={"ignore_eos": True})
        for _ in range(4)
    ]
    for stream in streams:
        next(iter(stream))
        stream.close()
    # All four places of the replica were taken; one that comes now would wait for 900 tokens.
    began = time.monotonic()
    assert chat(client, QUESTIONS[4], max_tokens=4).usage.completion_tokens == 4
    print(f"the next request took {time.monotonic() - began:.1f} s")  # noqa: T201


def test_sglangs_own_metrics_are_on_the_endpoint_of_all_others(cluster: ClusterProcess) -> None:
    def total(name: str, **labels: str) -> float:
        return MetricsSnapshot.read(cluster.state.metrics_url).total(name, **labels)

    for name in (
        "sglang_prompt_tokens_total",  # of the tokenizer, in the replica's actor
        "sglang_time_to_first_token_seconds_count",
        "sglang_max_total_num_tokens",  # of the scheduler
        "paceline_kv_pages",
    ):
        wait_until(lambda: total(name) > 0, timeout_s=120, what=name)  # noqa: B023
    assert total("sglang_time_to_first_token_seconds_bucket", le="+Inf") > 0


def test_a_killed_scheduler_has_its_replica_replaced(
    cluster: ClusterProcess, client: openai.OpenAI, receiver: OtlpReceiver
) -> None:
    before = chat(client, QUESTIONS[0]).choices[0].message.content
    story = "Tell me again, in other words: " + " ".join(QUESTIONS)
    num_put = tier_pages(cluster, "put")
    told = chat(client, story)
    num_pages = told.usage.prompt_tokens // 64
    assert num_pages >= 2
    wait_until(
        lambda: tier_pages(cluster, "put") >= num_put + num_pages,
        timeout_s=120,
        what="pages in the tier",
    )
    (scheduler,) = [p for p in sglang_processes(cluster) if p.name().startswith("sglang::sched")]
    scheduler.kill()

    def serves_again() -> bool:
        try:
            return chat(client, QUESTIONS[0]).choices[0].message.content == before
        except openai.APIError:
            return False

    wait_until(serves_again, timeout_s=START_TIMEOUT_S, what="an answer from a new replica")
    assert scheduler not in sglang_processes(cluster)
    # The new one has computed nothing of it: its pages are those of the dead one.
    again = chat(client, story, extra_headers={"traceparent": f"00-{TRACE_ID}-{CALLER_ID}-01"})
    assert again.usage.prompt_tokens_details.cached_tokens >= 64 * (num_pages - 1)
    assert again.choices[0].message.content == told.choices[0].message.content
    wait_until(lambda: tier_pages(cluster, "hit") > 0, timeout_s=120, what="the count of pages")
    assert_one_trace_leads_from_the_caller_to_the_pages(receiver, num_pages)


def assert_one_trace_leads_from_the_caller_to_the_pages(
    receiver: OtlpReceiver, num_pages: int
) -> None:
    wanted = {"target.generate", "prefill_forward", "decode_forward", "kv.load", "kv.get"}

    def is_whole() -> bool:
        spans = receiver.trace(TRACE_ID)
        names = {span.name for span in spans}
        ids = {span.span_id for span in spans} | {CALLER_ID}
        return wanted <= names and all(span.parent_id in ids for span in spans)

    wait_until(is_whole, timeout_s=120, what="a whole trace")
    spans = receiver.trace(TRACE_ID)
    named = {span.name: span for span in spans}
    (generate,) = (span for span in spans if span.name == "target.generate")
    (root,) = ancestors(generate, spans)
    assert (root.service, root.parent_id) == ("paceline-ingress", CALLER_ID)
    (request,) = (s for s in spans if s.attributes.get("module") == "sglang::request")
    assert ancestors(request, spans) == [generate, root]
    for name in ("prefill_forward", "decode_forward"):
        assert named[name].service == "paceline-sglang"
        assert ancestors(named[name], spans)[-3:] == [request, generate, root]
    load = named["kv.load"]
    assert load.service == "paceline-sglang"
    assert ancestors(load, spans) == [generate, root]
    assert load.attributes["paceline.kv.pages_loaded"] >= num_pages - 1
    assert load in ancestors(named["kv.get"], spans)


def test_a_stop_leaves_no_process(cluster: ClusterProcess) -> None:
    running = cluster.processes()
    assert len(sglang_processes(cluster)) >= 2
    cluster.signal(signal.SIGTERM)
    assert cluster.wait() == 0
    assert not cluster.processes()
    assert not still_running(running)
