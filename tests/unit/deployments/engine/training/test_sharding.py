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

from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture
from deployments.engine.training.config import DraftTrainingConfig, StudentConfig
from deployments.engine.training.initial import start_from_target
from deployments.engine.training.methods import StudentMethod, method_of
from deployments.engine.training.objective import DraftObjective
from deployments.engine.training.plan import WholePlan
from deployments.engine.training.run import DraftRun
from deployments.engine.training.sharding import ProcessMesh
from deployments.engine.training.trainer import DraftTrainer
from tests.unit.deployments.engine.torch_engine.tiny_models import loaded_model
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
STOP = 2
TOGETHER = {
    "data": ("head", 1),
    "tensor": ("head", 2),
    "tensor-student": ("student", 2),
}
"""What two processes train, and how many of them hold a matrix together."""


def a_head():
    untrained = head()
    start_from_target(untrained, target().model, texts(), scale())
    # One text of the eleven is alone in its batch: a process has nothing to learn from there.
    return objective(untrained), texts()[:11], texts(4, seed=9)


def a_student():
    """Of a target with biases and norms of its heads."""
    loaded = loaded_model("biased-qwen3-of-6-layers")
    method = StudentMethod(StudentConfig(first_layers=2, last_layers=1), loaded.config)
    generator = torch.Generator().manual_seed(3)
    written = torch.randint(3, 97, (11, 24), generator=generator).tolist()
    capture = FeatureCapture(loaded, method.aux_layers, max_length=64)
    kept = list(capture.texts([AnsweredPrompt(text, 5) for text in written]))
    draft, its_scale = method.start(loaded, torch.arange(3, 43), lambda: kept)
    config = CONFIG.objective.model_copy(update={"num_unrolls": 1})
    return DraftObjective(draft, loaded.model, config, its_scale), kept, kept[:4]


def run_in(folder, kind, tensor_parallel=1):
    trained, kept, held_out = {"head": a_head, "student": a_student}[kind]()
    store = InMemory(kept)
    mesh = ProcessMesh.of_default_group(tensor_parallel, "cpu")
    mesh.shard(trained)
    plan = WholePlan(store.lengths, RUN)
    trainer = DraftTrainer(trained, RUN, plan.end, "cpu", mesh)
    say = lambda _: None  # noqa: E731
    return DraftRun(folder, trainer, RUN, store, plan, held_out, say, fingerprint=kind, costs=COSTS)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The first steps of every run, on two processes, which meet in a file."""
    folder = tmp_path_factory.mktemp("begun")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(rank)],
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(600) for process in processes] == [0, 0]
    finally:  # one waits for the other for ever
        for process in processes:
            process.kill()
            process.wait()
    return folder


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt")


@pytest.mark.parametrize("name", TOGETHER)
def test_two_processes_and_then_one_make_the_weights_of_one(begun, tmp_path, name):
    kind, _ = TOGETHER[name]
    run_in(tmp_path, kind).run()
    assert checkpoint(begun / name)["num_steps_done"] == STOP
    run_in(begun / name, kind).run()
    one, other = checkpoint(tmp_path), checkpoint(begun / name)
    assert one["num_steps_done"] == other["num_steps_done"] > STOP
    # Two halves are summed otherwise than the whole: 1.5e-5 apart, where a step moves 3e-3.
    for key, weight in one["model"].items():
        torch.testing.assert_close(other["model"][key], weight, rtol=0, atol=5e-5)
    assert other["num_tokens"] == one["num_tokens"]
    for mine, theirs in zip(other["curve"], one["curve"], strict=True):
        assert mine["num_tokens"] == theirs["num_tokens"]
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        expected = pytest.approx(theirs["quality"]["acceptance"], abs=1e-6)
        assert mine["quality"]["acceptance"] == expected


def test_processes_that_cannot_get_whole_heads_are_refused():
    with pytest.raises(ValueError, match="4 does not divide the target's 2 key-value heads"):
        method_of(DraftTrainingConfig(num_processes=4, tensor_parallel=4), target().config)
    with pytest.raises(ValueError, match="multiple of tensor_parallel"):
        DraftTrainingConfig(num_processes=3, tensor_parallel=2)


class StoppedError(Exception):
    """Its number of steps is done and saved."""


def begin(folder, kind, tensor_parallel):
    a_run = run_in(folder, kind, tensor_parallel)
    weights = a_run._trainer.objective.parameters()
    matrices = [weight for weight in weights if weight.ndim == 2]
    assert all(2 * matrix.to_local().numel() == matrix.numel() for matrix in matrices)
    save = a_run._save

    def save_and_stop():
        save()
        if a_run._trainer.num_steps_done == STOP:
            raise StoppedError

    a_run._save = save_and_stop
    with contextlib.suppress(StoppedError):
        a_run.run()


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    store = f"file://{folder / 'meeting'}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    for name, (kind, tensor_parallel) in TOGETHER.items():
        begin(folder / name, kind, tensor_parallel)
    distributed.destroy_process_group()
    # The group's threads may still let go of Python objects while the interpreter goes down, which
    # would abort a process whose work is done.
    sys.stderr.flush()
    os._exit(0)
