"""``paceline train draft`` in two processes on a Ray of its own, one of which is killed."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fakes_tokenizer import write_tokenizer
from tests.ray_workers import run_and_kill_one

pytestmark = pytest.mark.integration

SETTINGS = {
    "engine": {"num_pages": 64, "max_num_seqs": 4, "num_threads": 1},
    "training": {
        "answers": {"max_tokens": 24, "held_out_prompts": 4},
        "run": {
            "draft_vocab_size": 64,
            "objective": {"num_unrolls": 2},
            "batch_tokens": 256,
            "max_length": 128,
            "epochs": 60,
            "checkpoint_steps": 20,
            "evaluate_steps": 40,
            "num_draft_tokens": 3,
        },
    },
}
SHAPE = LlamaConfig(
    vocab_size=264,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.15,
    eos_token_id=2,
    tie_word_embeddings=True,
)


@pytest.fixture
def command(tmp_path):
    """The command for a model of six tiny layers, without a folder."""
    model = write_tokenizer(tmp_path / "model")
    torch.manual_seed(3)
    LlamaForCausalLM(SHAPE).save_pretrained(model)
    settings = SETTINGS | {
        "cache_dir": str(tmp_path / "cache"),
        "engine": SETTINGS["engine"] | {"model": str(model)},
    }
    (tmp_path / "c.yaml").write_text(json.dumps(settings))
    (tmp_path / "p.txt").write_text("".join(f"question {i} of some\n" for i in range(16)))
    return [
        *(sys.executable, "-m", "cluster", "train", "draft", "--json"),
        *("--config", str(tmp_path / "c.yaml"), "--prompts", str(tmp_path / "p.txt")),
    ]


def test_a_run_goes_on_without_its_killed_process(command, tmp_path):
    """``make train-smoke`` compares the weights it ends with."""
    out = tmp_path / "out"
    environment = os.environ | {
        "PACELINE_TRAINING__NUM_PROCESSES": "2",
        "PACELINE_TRAINING__MIN_PROCESSES": "2",
        "PACELINE_TRAINING__TENSOR_PARALLEL": "2",
        "PACELINE_STATE_DIR": str(tmp_path / "state"),
    }
    environment.pop("RAY_ADDRESS", None)
    ended = run_and_kill_one(
        [*command, "--out", str(out)], environment, lambda said: "step 40, " in said
    )
    assert ended.said.count("training in 2 of 2 processes") == 2
    assert "warning: lost process" in ended.said
    assert "going on behind step" in ended.said
    assert ended.left == []
    assert not (out / "ray").exists()
    # Nothing of Ray's is printed among the result.
    steps = [point["step"] for point in json.loads(ended.stdout)["curve"]]
    assert steps == sorted(set(steps))
    assert torch.load(out / "checkpoint.pt")["num_steps_done"] == steps[-1] > 40
