"""How the command waits for Ray Train; the board is in this process."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from ray.train import TrainingFailedError, WorkerGroupError

from cluster import draft_fit, ray_training
from cluster.draft_fit import check_processes
from cluster.errors import ConfigError, TrainingError
from deployments.engine.training.config import DraftTrainingConfig


@pytest.fixture
def board(monkeypatch):
    """A board whose methods answer at once."""
    own = ray_training._Board()
    monkeypatch.setattr(ray_training.ray, "get", lambda answer, timeout: answer)
    names = ("began", "lost", "tell", "take")
    return SimpleNamespace(**{name: SimpleNamespace(remote=getattr(own, name)) for name in names})


def test_what_is_said_before_the_end_is_passed_on(board):
    heard = []

    def fit():
        board.began.remote("training in 2 of 2 processes")
        board.tell.remote("step 1")
        return "report"

    assert ray_training._watch(fit, board, heard.append, start_timeout_s=60) == "report"
    assert heard == ["training in 2 of 2 processes", "step 1"]


def test_processes_that_do_not_start_end_the_command(board):
    ended = threading.Event()
    with pytest.raises(
        TrainingError, match=r"no processes within 0 s \(training.start_timeout_s\)"
    ):
        ray_training._watch(ended.wait, board, lambda _: None, start_timeout_s=0.0)
    ended.set()


def test_so_do_processes_that_are_not_replaced(board, monkeypatch):
    monkeypatch.setattr(ray_training, "_POLL_S", 0.01)
    ended = threading.Event()
    heard = []

    def hear(line):
        heard.append(line)
        if line == "training":
            ray_training._LossTeller(board).after_exception(None, {1: RuntimeError("killed")})

    board.began.remote("training")
    with pytest.raises(TrainingError, match="no processes within"):
        ray_training._watch(ended.wait, board, hear, start_timeout_s=0.05)
    ended.set()
    assert heard == ["training", "warning: lost process 1 of the training"]


def test_what_ray_train_raises_is_raised(board):
    def fit():
        raise WorkerGroupError("two of them", {0: RuntimeError("\nno memory\nat all")})

    with pytest.raises(TrainingFailedError) as met:
        ray_training._watch(fit, board, lambda _: None, start_timeout_s=60)
    told = ray_training._what_failed(met.value)
    assert told == "training processes ended too often (process 0: no memory)"


def test_what_is_not_installed_is_told_before_any_work(monkeypatch):
    monkeypatch.setattr(draft_fit, "find_spec", lambda name: None if name == "pandas" else name)
    check_processes(DraftTrainingConfig())
    with pytest.raises(ConfigError, match=r"pip install 'paceline\[train\]'"):
        check_processes(DraftTrainingConfig(num_processes=2))
