"""The examples of the docs, against one cluster that runs the custom drafter and codec as well."""

import signal
import subprocess
import sys

import httpx
import psutil
import pytest

from cluster.config import default_cache_dir
from cluster.local_cluster import STOP_TIMEOUT_S
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from tests.integration.cluster.cluster_process import ROOT, ClusterProcess

pytestmark = pytest.mark.integration

KEY = "key-of-the-examples"
CONFIG = f"""
server: {{http_port: 0, grpc_port: 0}}
engine: {{max_model_len: 512, num_pages: 32}}
draft: {{drafter: "docs.examples.custom_drafter:build"}}
kv:
  codec: "docs.examples.custom_codec:BytePlaneCodec"
  tiers: [{{kind: embedded_valkey, max_memory_bytes: 67108864}}]
auth:
  cluster_secret: 0123456789abcdef0123456789abcdef
  tenants: [{{name: reader, api_keys: ["{KEY}"]}}]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    prepare_builtin(default_cache_dir(), print)
    folder = tmp_path_factory.mktemp("examples")
    path = folder / "config.yaml"
    path.write_text(CONFIG)
    process = ClusterProcess(["-m", "cluster", "serve", "--config", str(path)], folder / "state")
    try:
        process.wait_for("serving until Ctrl-C")
        yield process
        process.signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0
        assert not process.processes()
    finally:
        process.kill()


def run(cluster: ClusterProcess, *command: str) -> str:
    environment = ClusterProcess.environment(ROOT) | {
        "PACELINE_URL": cluster.state.http_url,
        "PACELINE_GRPC": cluster.state.grpc_address,
        "PACELINE_API_KEY": KEY,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def complete(cluster: ClusterProcess, **fields) -> httpx.Response:
    body = {"model": "smollm2-135m-instruct", "prompt": "One, two,", "temperature": 0} | fields
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{cluster.state.http_url}/v1/completions"
    return httpx.post(url, json=body, headers=headers, timeout=120)


def test_openai_sdk(cluster):
    output = run(cluster, sys.executable, "docs/examples/openai_sdk.py")
    assert "completion_tokens" in output
    assert "mean_acceptance_length" in output


def test_grpc_client(cluster):
    output = run(cluster, sys.executable, "docs/examples/grpc_client.py")
    assert "smollm2-135m-instruct, up to 512 tokens" in output
    assert "tokens, " in output.splitlines()[-1]


def test_curl(cluster):
    output = run(cluster, "bash", "docs/examples/curl.sh")
    assert '"finish_reason":"length"' in output.replace(" ", "")
    assert output.rstrip().endswith("data: [DONE]")


def test_a_killed_draft_replica_costs_no_request_and_no_token(cluster):
    expected = complete(cluster, max_tokens=48).json()["choices"][0]["text"]
    drafts = [p for p in cluster.processes() if "paceline:draft" in " ".join(p.cmdline())]
    assert drafts
    for process in drafts:
        process.kill()
    psutil.wait_procs(drafts, 10)
    answer = complete(cluster, max_tokens=48)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == expected
