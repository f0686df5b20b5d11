"""The whole cluster on the real model loses parts in mid-stream; the client notices nothing."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from cluster.config import default_cache_dir
from cluster.errors import RequestError
from cluster.metrics_reader import MetricsSnapshot
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from tests.integration.cluster.cluster_process import ClusterProcess
from tests.kv_pages import wait_until

if TYPE_CHECKING:
    import psutil

pytestmark = pytest.mark.integration

CONFIG = """
server: {http_port: 0, grpc_port: 0}
engine: {max_model_len: 512, num_pages: 32, speculation: {num_draft_tokens: 3}}
pools: {target: {replicas: 2}, prefill: {replicas: 1}}
prefill: {min_tokens: 128, timeout_s: 120, queue_timeout_s: 30, max_slowdown: 1000}
kv: {tiers: [{kind: embedded_valkey, max_memory_bytes: 67108864, operation_timeout_s: 20}]}
"""
BODY = {
    "model": "smollm2-135m-instruct",
    "messages": [{"role": "user", "content": "Write the numbers from one to thirty in words."}],
    "max_tokens": 96,
    "temperature": 0.8,
    "seed": 5,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    prepare_builtin(default_cache_dir(), print)
    folder = tmp_path_factory.mktemp("failures")
    path = folder / "config.yaml"
    path.write_text(CONFIG)
    process = ClusterProcess(["-m", "cluster", "serve", "--config", str(path)], folder / "state")
    try:
        process.wait_for("serving until Ctrl-C")
        yield process
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert not process.processes()
    finally:
        process.kill()


def replicas_of(cluster: ClusterProcess, pool: str) -> list[psutil.Process]:
    return [p for p in cluster.processes() if f"paceline:{pool}" in " ".join(p.cmdline())]


def busiest(processes: list[psutil.Process]) -> psutil.Process:
    """The one that computes; measured over some steps of the stream that is running."""
    before = [sum(p.cpu_times()[:2]) for p in processes]
    time.sleep(0.4)
    used = [sum(p.cpu_times()[:2]) - b for p, b in zip(processes, before, strict=True)]
    return processes[used.index(max(used))]


def stream(cluster: ClusterProcess, pool_to_kill: str | None = None, **fields) -> tuple[str, dict]:
    """The text and the last event; one replica of the pool is killed after some tokens."""
    text, last = "", {}
    url = f"{cluster.state.http_url}/v1/chat/completions"
    with httpx.stream("POST", url, json=BODY | fields, timeout=180) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            last = json.loads(line[6:])
            assert "error" not in last, last
            text += "".join(choice["delta"].get("content") or "" for choice in last["choices"])
            if pool_to_kill and len(text) > 40:
                busiest(replicas_of(cluster, pool_to_kill)).kill()
                pool_to_kill = None
    assert pool_to_kill is None, "the text was too short to kill anything in its middle"
    return text, last


@pytest.fixture(scope="module")
def plain(cluster) -> str:
    text, _ = stream(cluster, speculation=False)
    assert len(text) > 100
    return text


def test_a_killed_drafter(cluster, plain):
    text, last = stream(cluster, "draft")
    assert text == plain
    assert last["metrics"]["speculative_decoding"]["num_draft_tokens"] > 0


def test_a_killed_target(cluster, plain):
    text, last = stream(cluster, "target")
    assert text == plain
    assert last["usage"]["completion_tokens"] > 40


def price_list(fruit: str) -> str:
    """Some 300 tokens, four full pages."""
    return "".join(f"{fruit} {number}: {number * 37 % 89} coins. " for number in range(30))


def complete(cluster: ClusterProcess, prompt: str, **fields) -> tuple[str, dict]:
    """A whole answer's text and usage."""
    body = {"model": BODY["model"], "prompt": prompt, "max_tokens": 24, "temperature": 0.8}
    url = f"{cluster.state.http_url}/v1/completions"
    response = httpx.post(url, json=body | {"seed": 5} | fields, timeout=180)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["text"], answer["usage"]


def computed_where_it_is_answered(cluster: ClusterProcess, prompt: str) -> str:
    """As without a prefill pool: whoever wants a prompt's log probabilities uses no cached page."""
    return complete(cluster, prompt, prompt_logprobs=1)[0]


def num_prefilled(cluster: ClusterProcess) -> float:
    try:
        snapshot = MetricsSnapshot.read(cluster.state.metrics_url)
    except RequestError:
        return 0  # the endpoint of the metrics comes up in its own time
    return snapshot.total("paceline_prefill_calls_total", outcome="loadable")


def test_a_prefill_pool_and_its_death(cluster):
    apples, pears = price_list("Apple"), price_list("Pear")
    text, usage = complete(cluster, apples)
    assert usage["prompt_tokens"] > 256
    # What the pool computed for this request is nobody's cache.
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    wait_until(lambda: num_prefilled(cluster) >= 1, 120)
    assert text == computed_where_it_is_answered(cluster, apples)
    for process in replicas_of(cluster, "prefill"):
        process.kill()
    text, _ = complete(cluster, pears)
    assert text == computed_where_it_is_answered(cluster, pears)
