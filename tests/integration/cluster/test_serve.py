"""``paceline serve`` with the built-in model: it answers, survives its Valkey, and stops clean."""

import json
import signal
import subprocess
import sys

import httpx
import pytest

from cluster.config import default_cache_dir
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from tests.integration.cluster.cluster_process import ROOT, ClusterProcess, still_running
from tests.kv_pages import wait_until

pytestmark = pytest.mark.integration

MODEL = "smollm2-135m-instruct"
EMBEDDED = """
server: {http_port: 0, grpc_port: 0}
engine: {max_model_len: 512, num_pages: 32}
draft: {drafter: suffix}
kv:
  tiers:
    - {kind: embedded_valkey, max_memory_bytes: 67108864}
    - {kind: ssd, root: SSD_ROOT, budget_bytes: 67108864, segment_bytes: 16777216}
"""
UNREACHABLE = """
server: {http_port: 0, grpc_port: 0}
engine: {max_model_len: 512, num_pages: 32}
pools: {draft: null}
kv: {tiers: [{kind: valkey, url: "redis://:hidden-password@127.0.0.1:1/0"}]}
"""


@pytest.fixture(scope="module", autouse=True)
def _weights():
    prepare_builtin(default_cache_dir(), print)


@pytest.fixture
def serve(tmp_path):
    started: list[ClusterProcess] = []

    def start(config: str) -> ClusterProcess:
        path = tmp_path / "config.yaml"
        path.write_text(config.replace("SSD_ROOT", str(tmp_path / "ssd")))
        command = ["-m", "cluster", "serve", "--config", str(path)]
        started.append(ClusterProcess(command, tmp_path / "state"))
        started[-1].wait_for("serving until Ctrl-C")
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def paceline(tmp_path):
    """Another shell of the same user."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = ClusterProcess.environment(tmp_path / "state")
        command = [sys.executable, "-m", "cluster", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )

    return run


def complete(url: str, prompt: str = "One, two, three, four, five, six,") -> str:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=180)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_a_cluster_outlives_its_valkey_and_sigterm_leaves_nothing(serve, paceline, tmp_path):
    cluster = serve(EMBEDDED)
    state = cluster.state
    text = complete(state.http_url)
    assert text

    status = json.loads(paceline("status", "--json").stdout)
    assert [report["cluster_id"] for report in status] == [state.cluster_id]
    assert status[0]["health"] == "ok"
    chat = paceline("chat", "Say hello.", "--max-tokens", "8", "--temperature", "0")
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.strip()
    [valkey, ssd] = json.loads(paceline("kv", "--json").stdout)
    assert valkey["address"] == state.kv_address
    assert ssd["path"] == state.ssd_roots[0]

    text_file = tmp_path / "system.txt"
    text_file.write_text("You answer questions about trains and their timetables. " * 30)
    [warmed] = json.loads(paceline("kv", "warm", str(text_file), "--json").stdout)
    assert (warmed["error"], warmed["prompt_tokens"] > 192) == ("", True)
    wait_until(lambda: json.loads(paceline("kv", "--json").stdout)[0]["num_pages"] >= 3, 60)
    looks = []

    def has_looked() -> bool:
        answer = paceline("kv", "top", "--count", "1", "--json")
        looks.extend(map(json.loads, answer.stdout.splitlines()))
        return answer.returncode == 0

    wait_until(has_looked, 60)  # the endpoint of the metrics comes up in its own time
    [look] = looks
    assert look["usage"][0]["num_pages"] >= 3
    assert sum(row["num_pages"] for row in look["namespaces"]) >= 3

    processes = cluster.processes()
    [server] = [process for process in processes if process.name() == "valkey-server"]
    server.kill()
    server.wait(10)
    assert complete(state.http_url) == text
    assert complete(state.http_url, "A prompt that is new to this cluster, of more words:")
    assert paceline("kv").returncode != 0

    cluster.signal(signal.SIGTERM)
    assert cluster.wait() == 0
    assert "stopped, nothing is left" in cluster.output
    assert not still_running(processes)
    assert not cluster.processes()


def test_an_unreachable_valkey_is_warned_about_and_sigint_leaves_nothing(serve):
    cluster = serve(UNREACHABLE)
    assert "warning: Valkey at 127.0.0.1:1 is unreachable" in cluster.output
    assert "hidden-password" not in cluster.output
    assert complete(cluster.state.http_url)
    cluster.signal(signal.SIGINT)
    assert cluster.wait() == 0
    assert not cluster.processes()
