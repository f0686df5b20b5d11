"""The real SGLang verifies the drafts of a real draft deployment."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import pytest

from cluster.local_cluster import STOP_TIMEOUT_S
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.engine.types import GenerationRequest, SamplingParams
from deployments.tokenizer import ChatTurn, Tokenizer
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as pb_grpc
from tests.exactness import Reference, assert_same_text
from tests.ray_cluster import wait_until
from tests.sglang.embedded import by_the_embedded_engine
from tests.sglang.served import MODEL, PYTHON, START_TIMEOUT_S, served, tier_pages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.cluster.cluster_process import ClusterProcess
    from tests.otlp_receiver import OtlpReceiver

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(900),
    pytest.mark.skipif(PYTHON is None, reason="make test-sglang runs it"),
]

ROOT = Path(__file__).resolve().parents[2]
MAX_TOKENS = 64
REPEATING = (
    "Repeat ten times: red, green, blue, yellow.",
    "Say this line over and over: the cat sat on the mat and looked at the hat.",
    "Count again and again: one two three four one two three four one two three four",
    "Write the word banana forty times, with a comma behind each.",
)
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.8, "top_p": 0.9}


@pytest.fixture(scope="module")
def cluster(
    folder: Path, receiver: OtlpReceiver, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClusterProcess]:
    # Without a local drafter, so that every accepted token is one of the pool's.
    engine = {"speculation": {"local_drafter": "none"}, "kv_load_timeout_s": 30}
    tier = {"kind": "embedded_valkey", "name": "hot", "operation_timeout_s": 10}
    place = tmp_path_factory.mktemp("cluster")
    tracing = {"exporter": "otlp", "otlp_endpoint": receiver.endpoint}
    with served(
        place,
        folder,
        engine,
        draft={"drafter": "suffix"},
        kv={"tiers": [tier]},
        tracing=tracing,
    ) as process:
        yield process


@pytest.fixture(scope="module")
def rpc(cluster: ClusterProcess) -> Iterator[pb_grpc.InferenceStub]:
    with grpc.insecure_channel(cluster.state.grpc_address) as channel:
        yield pb_grpc.InferenceStub(channel)


def ask(
    rpc: pb_grpc.InferenceStub, question: str, sampling: dict[str, float], *, is_drafted: bool
) -> pb.GenerateResponse:
    messages = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=question)])
    options = pb.SamplingOptions(max_tokens=MAX_TOKENS, seed=11, **sampling)
    request = pb.GenerateRequest(
        model=MODEL, chat=messages, sampling=options, speculation=is_drafted
    )
    return rpc.GenerateUnary(request, timeout=600)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_of_the_pool_change_no_token(
    rpc: pb_grpc.InferenceStub, folder: Path, sampling: dict[str, float]
) -> None:
    def all_of(*, is_drafted: bool) -> list[pb.GenerateResponse]:
        with ThreadPoolExecutor(4) as threads:
            return list(
                threads.map(lambda q: ask(rpc, q, sampling, is_drafted=is_drafted), REPEATING)
            )

    plain = all_of(is_drafted=False)
    assert all(not answer.speculation.num_draft_tokens for answer in plain)

    drafted: list[pb.GenerateResponse] = []

    def are_all_drafted() -> bool:
        """Links may come up too late for the first texts."""
        drafted[:] = all_of(is_drafted=True)
        return any(answer.speculation.num_accepted_pool_tokens for answer in drafted)

    wait_until(are_all_drafted, timeout_s=600, what="accepted tokens of the pool")
    tokenizer = Tokenizer.load(folder)
    requests = [
        GenerationRequest(
            request_id=question,
            prompt_token_ids=tuple(tokenizer.encode_chat([ChatTurn("user", question)])),
            sampling=SamplingParams(max_tokens=MAX_TOKENS, seed=11, **sampling),
        )
        for question in REPEATING
    ]
    expected, actual = (
        {
            question: list(answer.choices[0].token_ids)
            for question, answer in zip(REPEATING, answers, strict=True)
        }
        for answers in (plain, drafted)
    )
    assert sum(map(len, expected.values())) > MAX_TOKENS
    assert_same_text(Reference(default_cache_dir()), requests, expected, actual)
    stats = [answer.speculation for answer in drafted]
    num_steps = sum(s.num_spec_steps for s in stats)
    num_accepted = sum(s.num_accepted_draft_tokens for s in stats)
    print(f"{1 + num_accepted / num_steps:.2f} tokens per verification")  # noqa: T201
    if sampling is GREEDY:
        assert 1 + num_accepted / num_steps > 1.5


def test_rounds_and_drafter_are_in_the_requests_trace(
    rpc: pb_grpc.InferenceStub, receiver: OtlpReceiver
) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    messages = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=REPEATING[1])])
    options = pb.SamplingOptions(max_tokens=MAX_TOKENS, seed=11, temperature=0.0)
    request = pb.GenerateRequest(model=MODEL, chat=messages, sampling=options, speculation=True)
    metadata = (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"),)
    answer = rpc.GenerateUnary(request, timeout=600, metadata=metadata)
    wanted = {"target.generate", "draft.rounds", "draft.session"}
    wait_until(
        lambda: wanted <= {span.name for span in receiver.trace(trace_id)},
        timeout_s=120,
        what="spans of the rounds",
    )
    spans = receiver.trace(trace_id)
    named = {span.name: span for span in spans}
    rounds = named["draft.rounds"]
    assert rounds.service == "paceline-sglang"
    assert set(rounds.events) == {"round"}
    assert rounds.attributes["paceline.rounds"] == len(rounds.events)
    assert rounds.attributes["paceline.accepted"] == answer.speculation.num_accepted_draft_tokens
    assert named["draft.session"].service == "paceline-draft"
    for name in ("draft.rounds", "draft.session"):
        assert named[name].parent_id == named["target.generate"].span_id
    assert len(answer.choices[0].token_ids) > len(rounds.events)


def stream(cluster: ClusterProcess, *, kills_drafter: bool = False, **fields: Any) -> str:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": REPEATING[0]}],
        "max_tokens": 200,
        "temperature": 0.8,
        "top_p": 0.9,
        "seed": 3,
        "ignore_eos": True,
        "stream": True,
    }
    text = ""
    url = f"{cluster.state.http_url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body | fields, timeout=600) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if kills_drafter and len(text) > 40:
                kills_drafter = False
                for process in cluster.processes():
                    if "paceline:draft" in " ".join(process.cmdline()):
                        process.kill()
    assert not kills_drafter
    return text


def test_texts_that_were_drafted_for_are_shared(cluster: ClusterProcess) -> None:
    wait_until(lambda: tier_pages(cluster, "put") > 0, timeout_s=300, what="pages in the tier")


def test_a_killed_drafter_costs_no_token(cluster: ClusterProcess) -> None:
    plain = stream(cluster, speculation=False)
    assert len(plain) > 200
    assert stream(cluster, kills_drafter=True) == plain


def test_a_stop_leaves_no_process(cluster: ClusterProcess) -> None:
    cluster.signal(signal.SIGTERM)
    assert cluster.wait(STOP_TIMEOUT_S) == 0
    assert not cluster.processes()


def test_one_scheduler_gives_the_embedded_engines_text_with_a_drafter_that_dies(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(folder)
    asked: list[tuple[str, dict[str, Any]]] = [
        (REPEATING[0], GREEDY),
        (REPEATING[3], SAMPLED),
        (REPEATING[1], {"temperature": 1.0, "top_k": 20, "presence_penalty": 0.5}),
    ]
    requests = [
        GenerationRequest(
            request_id=f"r{number}",
            prompt_token_ids=tuple(tokenizer.encode_chat([ChatTurn("user", question)])),
            sampling=SamplingParams(max_tokens=48, seed=2**64 - 1 - number, **sampling),
        )
        for number, (question, sampling) in enumerate(asked)
    ]
    expected = asyncio.run(by_the_embedded_engine(requests, folder, tokenizer))
    path = tmp_path / "requests.json"
    path.write_text(json.dumps([asdict_of(request) for request in requests]))
    run = in_sglangs_python("tests.sglang.one_scheduler", str(folder), str(path))
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["num_links_lost"] > 0
    assert found["stall_p50_s"] > 0
    assert sum(counts["pool"] for counts in found["counts"].values()) > 0
    reference = Reference(default_cache_dir())
    assert_same_text(reference, requests, expected, found["tokens"])
    branching = found["branching"]
    assert branching["num_moved"] > 10
    assert branching["num_steps"] < 0.7 * max(map(len, expected.values()))
    assert_same_text(reference, requests, expected, branching["tokens"])


def asdict_of(request: GenerationRequest) -> dict[str, Any]:
    sampling = request.sampling
    names = ("max_tokens", "seed", "temperature", "top_k", "top_p", "presence_penalty")
    return {
        "request_id": request.request_id,
        "prompt_token_ids": request.prompt_token_ids,
        "sampling": {name: getattr(sampling, name) for name in names},
    }


def in_sglangs_python(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert PYTHON is not None
    run = subprocess.run(
        [PYTHON, "-m", module, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run


def test_an_sglang_that_moved_is_served_without_drafts(folder: Path) -> None:
    run = in_sglangs_python("tests.sglang.moved_sglang", str(folder))
    assert json.loads(run.stdout.splitlines()[-1]) == {"num_tokens": 6, "num_draft_tokens": 0}
    assert "GrammarTree.from_host is missing" in run.stderr
