"""The examples of the docs, against one cluster that runs the custom drafter and codec as well."""

import signal
import subprocess
import sys

import httpx
import openai
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.config import default_cache_dir
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.tokenizer import Tokenizer
from tests.integration.cluster.cluster_process import ROOT, ClusterProcess

pytestmark = pytest.mark.integration

MODEL = "smollm2-135m-instruct"
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
        assert process.wait() == 0
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
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def complete(cluster: ClusterProcess, **fields) -> httpx.Response:
    body = {"model": MODEL, "prompt": "One, two,", "temperature": 0} | fields
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


@pytest.fixture(scope="module")
def folder():
    return prepare_builtin(default_cache_dir(), print)


@pytest.fixture(scope="module")
def reference(folder):
    (gguf,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)

    @torch.inference_mode()
    def logprobs(token_ids):
        return model.eval()(torch.tensor([token_ids])).logits[0].log_softmax(dim=1)

    return logprobs


@pytest.fixture(scope="module")
def sdk(cluster):
    return openai.OpenAI(base_url=f"{cluster.state.http_url}/v1", api_key=KEY, timeout=120)


@pytest.fixture(scope="module")
def id_of(folder):
    """Bytes of a token -> its id; no two tokens of this vocabulary have the same."""
    tokenizer = Tokenizer.load(folder)
    return {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}


def test_log_probabilities_of_an_echo_are_those_of_transformers(folder, reference, sdk):
    prompt = "Café, 漢字 and 😀: " + "one, two, three, four, five, six, seven, eight, " * 8
    arguments = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0.9, "seed": 5}
    plain = sdk.completions.create(**arguments)
    answer = sdk.completions.create(
        **arguments, logprobs=3, echo=True, extra_body={"prompt_logprobs": 1}
    )
    text, told = answer.choices[0].text, answer.choices[0].logprobs
    assert text == prompt + plain.choices[0].text
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(prompt).input_ids
    want = reference(token_ids)
    assert len(token_ids) > 128
    assert len(told.tokens) == len(token_ids) + answer.usage.completion_tokens
    assert told.token_logprobs[0] is told.top_logprobs[0] is None
    of_prompt = answer.choices[0].model_extra["prompt_logprobs"]
    assert len(of_prompt) == len(token_ids)
    for at, token_id in enumerate(token_ids[1:]):
        exact = float(want[at, token_id])
        assert told.token_logprobs[at + 1] == pytest.approx(exact, abs=1e-3)
        assert of_prompt[at + 1][str(token_id)]["logprob"] == told.token_logprobs[at + 1]
        best = sorted(told.top_logprobs[at + 1].values(), reverse=True)[:3]
        assert best == pytest.approx(want[at].topk(3).values.tolist(), abs=1e-3)
    ends = [*told.text_offset[1:], len(text)]
    for token, start, end in zip(told.tokens, told.text_offset, ends, strict=True):
        assert token.startswith(("bytes:", "<|")) or text[start:end] == token


def test_log_probabilities_of_a_chat_are_those_of_transformers(folder, reference, sdk, id_of):
    messages = [{"role": "user", "content": "Show me three emoji of animals, and count to nine."}]
    arguments = {"model": MODEL, "messages": messages, "max_tokens": 40, "seed": 9}
    arguments |= {"logprobs": True, "top_logprobs": 4}
    answer = sdk.chat.completions.create(**arguments, frequency_penalty=0.2)
    chunks = sdk.chat.completions.create(**arguments, frequency_penalty=0.2, stream=True)
    streamed, pieces = [], ""
    for chunk in chunks:
        choice = chunk.choices[0]
        streamed += choice.logprobs.content if choice.logprobs is not None else []
        pieces += choice.delta.content or ""
    told = answer.choices[0].logprobs.content
    assert pieces == answer.choices[0].message.content
    assert [entry.bytes for entry in streamed] == [entry.bytes for entry in told]
    assert len(told) == answer.usage.completion_tokens
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt_ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    output_ids = [id_of[bytes(entry.bytes)] for entry in told]
    assert tokenizer.decode(output_ids, skip_special_tokens=True) == pieces
    want = reference([*prompt_ids, *output_ids])[len(prompt_ids) - 1 :]
    for at, (token_id, whole, part) in enumerate(zip(output_ids, told, streamed, strict=True)):
        for entry in (whole, part):
            assert entry.logprob == pytest.approx(float(want[at, token_id]), abs=1e-3)
            best = [alternative.logprob for alternative in entry.top_logprobs]
            assert best == pytest.approx(want[at].topk(4).values.tolist(), abs=1e-3)
