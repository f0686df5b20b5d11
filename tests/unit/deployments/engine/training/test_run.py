from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deployments.engine.training.checkpoint import load_head
from deployments.engine.training.errors import RunMismatchError
from deployments.engine.training.initial import start_from_target
from deployments.engine.training.plan import WholePlan
from deployments.engine.training.run import DraftRun
from deployments.engine.training.step_costs import StepCosts
from deployments.engine.training.trainer import DraftTrainer
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
        "epochs": 3,
        "learning_rate": 3e-3,
        "checkpoint_steps": 2,
        "evaluate_steps": 4,
        "num_draft_tokens": 3,
    }
)
COSTS = StepCosts(target_s={1: 0.030, 4: 0.032, 11: 0.036}, draft_s={1: 0.002, 4: 0.003})


class InMemory:
    def __init__(self, kept):
        self._kept = kept
        self.lengths = [text.num_tokens for text in kept]

    def stream(self, indices):
        yield from map(self._kept.__getitem__, indices)


def draft_run(folder, config=RUN, progress=lambda _: None, held_out=None, fingerprint="texts"):
    kept = InMemory(texts())
    a_head = head()
    start_from_target(a_head, target().model, texts(), scale())
    trained = objective(a_head)
    plan = WholePlan(kept.lengths, config)
    trainer = DraftTrainer(trained, config, plan.end, "cpu")
    held_out = held_out or texts(4, seed=9)
    run = DraftRun(
        folder,
        trainer,
        config,
        kept,
        plan,
        held_out,
        progress,
        fingerprint=fingerprint,
        costs=COSTS,
    )
    return run, trainer


def test_a_run_makes_a_better_draft(tmp_path):
    lines = []
    # What a random target writes has nothing in common with what else it writes.
    config = RUN.model_copy(update={"epochs": 12})
    run, _ = draft_run(tmp_path, config, progress=lines.append, held_out=texts())
    best = run.run()
    assert best.score > run.curve[0].score
    assert best.step > 0
    points = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points] == [point.step for point in run.curve]
    assert any("commits" in line for line in lines)
    load_head(tmp_path / "draft")


def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path):
    whole, trainer = draft_run(tmp_path / "whole")
    whole.run()
    victim = subprocess.Popen(
        [sys.executable, "-u", "-m", __name__, str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=os.environ | {"PYTHONPATH": str(Path.cwd())},
    )
    for line in victim.stdout:
        if line.startswith("step 4"):
            break
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert victim.returncode == -signal.SIGKILL
    lines = []
    resumed, resumed_trainer = draft_run(tmp_path / "killed", progress=lines.append)
    assert any("going on behind step" in line for line in lines)
    resumed.run()
    for name, weight in trainer.state()["model"].items():
        assert torch.equal(weight, resumed_trainer.state()["model"][name]), name
    assert [p.quality for p in resumed.curve] == [p.quality for p in whole.curve]


def test_another_run_s_checkpoint_is_refused(tmp_path):
    run, _ = draft_run(tmp_path)
    run.run()
    with pytest.raises(RunMismatchError, match="other settings"):
        draft_run(tmp_path, RUN.model_copy(update={"seed": 1}))
    with pytest.raises(RunMismatchError, match="other texts"):
        draft_run(tmp_path, fingerprint="others")


def test_patience_ends_a_run_that_does_not_improve(tmp_path):
    useless = RUN.model_copy(update={"learning_rate": 1e-12, "patience": 1, "epochs": 50})
    run, trainer = draft_run(tmp_path, useless)
    run.run()
    assert trainer.num_steps_done == 4


if __name__ == "__main__":
    draft_run(Path(sys.argv[1]), progress=lambda line: sys.stdout.write(f"{line}\n"))[0].run()


def test_mixed_precision_multiplies_in_bfloat16_and_keeps_float32():
    losses = []
    for precision in ("float32", "bfloat16"):
        trained = objective(head())
        config = RUN.model_copy(update={"precision": precision})
        trainer = DraftTrainer(trained, config, 10, "cpu")
        losses.append([trainer.step([texts()[:6]]).loss for _ in range(10)])
        assert all(weight.dtype == torch.float32 for weight in trained.parameters())
        moments = [state["exp_avg"] for state in trainer._optimizer.state.values()]
        assert all(moment.dtype == torch.float32 for moment in moments)
    exact, mixed = losses
    assert mixed != exact
    assert mixed == pytest.approx(exact, rel=0.02)
    assert mixed[-1] < mixed[0]
