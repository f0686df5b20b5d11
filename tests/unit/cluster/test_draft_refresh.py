"""``paceline draft``: from logged traffic to a student on trial, on a model of six tiny layers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from cluster import cli
from cluster.config_loader import load_config
from cluster.draft_refresh import offer, open_shelf, refresh, wait_for_decision
from cluster.errors import ConfigError
from deployments.config import TrafficLogConfig
from deployments.engine.torch_engine.student import StudentWeights, read_student, write_student
from deployments.engine.torch_engine.student_shelf import Decision, stamp_of
from deployments.engine.torch_engine.weights.loader import load_model
from deployments.tokenizer import ChatTurn
from deployments.traffic_log import TrafficLog
from tests.tiny_jobs import write_job, write_model

if TYPE_CHECKING:
    from pathlib import Path

PROMOTED = Decision(outcome="promoted", reason="better: by far", decided_at=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def work(tmp_path, model):
    write_job(
        tmp_path,
        model,
        ingress={"traffic_log": {"tenants": ["default"], "folder": str(tmp_path / "traffic")}},
        training={
            "student": {"first_layers": 2, "last_layers": 2},
            "answers": {"max_tokens": 16, "held_out_prompts": 2},
            "run": {"num_draft_tokens": 2},
        },
    )
    return tmp_path


@pytest.fixture
def config(work):
    return load_config(work / "c.yaml")


@pytest.fixture
def student(model, work):
    """A file that fits the model."""
    target = load_model(str(model), dtype="float32", cache_dir=work)
    weights = StudentWeights(
        connector_weight=torch.eye(64),
        connector_bias=torch.zeros(64),
        draft_token_ids=torch.arange(264, dtype=torch.int32),
        logit_scale=1.0,
        kept_layers=(0, 1, 4, 5),
        joint=2,
        target_digest=target.weights_digest,
        num_positions=1,
        agreement=None,
    )
    return write_student(weights, work / "student" / "student.safetensors")


@pytest.fixture
def paceline(monkeypatch, capsys, work):
    def run(*arguments: str) -> tuple[int, str, str]:
        command = ["paceline", "draft", *arguments, "--config", str(work / "c.yaml")]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return run


def log(folder: Path, num_prompts: int) -> None:
    traffic = TrafficLog(TrafficLogConfig(tenants=("default",), folder=folder), lambda _: None)
    for number in range(num_prompts):
        traffic.record("default", [ChatTurn("user", f"question {number}")])
    traffic.close()


def test_a_student_trained_on_logged_traffic_is_put_on_trial(paceline, work, config):
    log(work / "traffic", 10)
    code, printed, said = paceline("refresh", "--out", str(work / "out"))
    assert code == 0, said
    assert "on trial:" in printed
    assert "8 prompts to train on, 2 held out" in said
    shelf = open_shelf(config)
    trained = read_student(shelf.candidate)
    assert trained.kept_layers == (0, 1, 4, 5)
    copy = work / "out" / "prompts.jsonl"
    assert copy.stat().st_mode & 0o777 == 0o600
    card = (work / "out" / "draft" / "README.md").read_text()
    assert "| prompts.jsonl | 10 | kept with the consent of the tenants they came from |" in card
    # A folder that is done is not taken for another refresh.
    code, _, said = paceline("refresh", "--out", str(work / "out"))
    assert code == 2
    assert "name another folder" in said


def test_a_refresh_that_was_cut_off_goes_on_with_the_prompts_it_began_with(work, config):
    log(work / "traffic", 6)

    class CutOffError(Exception):
        pass

    def tell(line: str) -> None:
        raise CutOffError

    def run(on_progress):
        return refresh(
            config, work / "out", prompt_files=[], command_line="", on_progress=on_progress
        )

    with pytest.raises(CutOffError):
        run(tell)
    log(work / "traffic", 9)
    lines: list[str] = []
    run(lines.append)
    assert "4 prompts to train on, 2 held out, 0 repeated or too long" in lines


def test_without_traffic_the_refresh_says_what_is_missing(paceline, work):
    code, _, said = paceline("refresh", "--out", str(work / "out"))
    assert code == 2
    assert "ingress.traffic_log holds no prompts" in said
    assert not (work / "out").exists()


def test_a_trial_is_shown_and_what_became_of_it_can_be_taken_back(paceline, config, student):
    code, printed, said = paceline("canary", str(student.parent))
    assert code == 0, said
    shelf = open_shelf(config)
    assert str(shelf.candidate) in printed.replace("\n", "")
    assert shelf.promote(stamp_of(shelf.candidate), PROMOTED)
    code, printed, _ = paceline("show", "--json")
    shown = json.loads(printed)
    assert shown["in_use"] == str(shelf.stable)
    assert shown["candidate"] is None
    assert shown["last_decision"]["outcome"] == "promoted"
    _, printed, _ = paceline("show")
    assert "better: by far" in printed
    offer(config, student)
    code, printed, said = paceline("rollback")
    assert code == 0, said
    assert not shelf.candidate.exists()
    assert shelf.last_decision().outcome == "withdrawn"
    assert shelf.in_use() == shelf.stable


def test_the_wait_ends_with_the_trial(config, student, monkeypatch):
    shelf = offer(config, student)

    def decide(_: float) -> None:
        shelf.promote(stamp_of(shelf.candidate), PROMOTED)

    monkeypatch.setattr("cluster.draft_refresh.time.sleep", decide)
    assert wait_for_decision(shelf) == PROMOTED


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"target_digest": "f00d"}, "was cut from f00d"),
        ({"draft_token_ids": torch.tensor([3, 264], dtype=torch.int32)}, "draft vocabulary"),
        ({"draft_token_ids": torch.tensor([4, 3], dtype=torch.int32)}, "draft vocabulary"),
        ({"kept_layers": (0, 1, 4, 6)}, "has no layers"),
        ({"joint": 4}, "joint 4"),
    ],
)
def test_a_student_that_does_not_fit_the_target_is_never_on_trial(config, student, change, problem):
    write_student(replace(read_student(student), **change), student)
    with pytest.raises(ConfigError, match=problem):
        offer(config, student)
    assert not open_shelf(config).candidate.exists()


def test_what_is_no_student_is_refused(config, work):
    with pytest.raises(ConfigError, match=r"holds no student\.safetensors"):
        offer(config, work)
    other = config.model_copy(
        update={"draft": config.draft.model_copy(update={"drafter": "suffix"})}
    )
    with pytest.raises(ConfigError, match="only a student is refreshed, not suffix"):
        open_shelf(other)
