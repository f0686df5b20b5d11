"""``paceline train draft`` in two processes on a Ray of its own, one of which is killed."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch

from tests.ray_workers import run_and_kill_one
from tests.tiny_jobs import write_job, write_model

pytestmark = pytest.mark.integration


@pytest.fixture
def command(tmp_path):
    """The command for a model of six tiny layers, without a folder."""
    run = {"epochs": 60, "checkpoint_steps": 20, "evaluate_steps": 40}
    # The command answers while the processes train on what is in its log already.
    features = {"mode": "online", "group_texts": 4}
    training = {"run": run, "features": features}
    write_job(tmp_path, write_model(tmp_path / "model"), training=training)
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
