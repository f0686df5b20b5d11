"""Two processes that train together, against one that trains alone."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed

from deployments.engine.training.initial import start_from_target
from deployments.engine.training.run import DraftRun, num_steps
from deployments.engine.training.sharding import end_process, shard
from deployments.engine.training.trainer import DraftTrainer
from tests.unit.deployments.engine.training.test_run import COSTS, InMemory
from tests.unit.deployments.engine.training.tiny_training import (
    CONFIG,
    head,
    objective,
    scale,
    target,
    texts,
)

RUN = CONFIG.model_copy(
    update={
        "epochs": 2,
        "accumulate": 2,
        "batch_tokens": 64,
        "learning_rate": 3e-3,
        "checkpoint_steps": 2,
        "evaluate_steps": 2,
        "num_draft_tokens": 3,
    }
)


def run_in(folder, config=RUN):
    # One text of the eleven is alone in its batch: a process has nothing to learn from there.
    kept = InMemory(texts()[:11])
    a_head = head()
    start_from_target(a_head, target().model, texts(), scale())
    trained = objective(a_head)
    if distributed.is_initialized():
        shard(trained)
    trainer = DraftTrainer(trained, config, num_steps(kept.lengths, config), "cpu")
    held_out = texts(4, seed=9)
    return DraftRun(
        folder,
        trainer,
        config,
        kept,
        held_out,
        lambda _: None,
        fingerprint="t",
        costs=COSTS,
    )


def together(folder, stop):
    """Some steps of the run on two processes, which meet in a file."""
    folder.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(rank), str(stop)],
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt")


def test_two_processes_and_then_one_make_the_weights_of_one(tmp_path):
    run_in(tmp_path / "alone").run()
    together(tmp_path / "begun", stop=2)
    begun = checkpoint(tmp_path / "begun")
    assert begun["num_steps_done"] == 2
    run_in(tmp_path / "begun").run()
    one, other = checkpoint(tmp_path / "alone"), checkpoint(tmp_path / "begun")
    assert one["num_steps_done"] == other["num_steps_done"] > 2
    for name, weight in one["model"].items():
        torch.testing.assert_close(other["model"][name], weight, rtol=0, atol=1e-5)
    assert other["num_tokens"] == one["num_tokens"]
    for mine, theirs in zip(other["curve"], one["curve"], strict=True):
        assert mine["num_tokens"] == theirs["num_tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        expected = pytest.approx(theirs["quality"]["acceptance"], abs=1e-6)
        assert mine["quality"]["acceptance"] == expected


class StoppedError(Exception):
    """Its number of steps is done and saved."""


if __name__ == "__main__":
    folder, rank, stop = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    store = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    a_run = run_in(folder)
    save = a_run._save

    def save_and_stop():
        save()
        if a_run._trainer.num_steps_done == stop:
            raise StoppedError

    a_run._save = save_and_stop
    with contextlib.suppress(StoppedError):
        a_run.run()
    end_process()
