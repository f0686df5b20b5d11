"""``paceline train draft`` from end to end, on a model of six tiny layers."""

import json
import shutil
import sys
import threading
from threading import Event

import pytest
import torch
from safetensors.torch import load_file

from cluster import cli
from cluster.config_loader import load_config
from cluster.draft_training import train_draft
from cluster.errors import ConfigError
from deployments.engine.torch_engine.student import load_student, read_student, save_student
from deployments.engine.training.answers import AnswerLog
from deployments.engine.training.checkpoint import load_head
from deployments.tokenizer import Tokenizer
from tests.tiny_jobs import write_job, write_model

CHANGES = {
    "engine": {"deterministic": True},
    "training": {
        "answers": {"per_prompt": 2},
        "run": {"epochs": 3, "learning_rate": 3e-3, "checkpoint_steps": 2, "evaluate_steps": 4},
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def work(tmp_path, model):
    """A config file and prompts in an empty folder."""
    write_job(tmp_path, model, **CHANGES)
    return tmp_path


def train(work, out="out", tell=lambda _: None, config=None, **changes):
    arguments = {
        "prompt_files": [work / "p.txt"],
        "licences": ["CC0"],
        "held_out_files": [],
        "self_chat": False,
        "command_line": "paceline train draft",
        "on_progress": tell,
    } | changes
    return train_draft(config or load_config(work / "c.yaml"), work / out, **arguments)


@pytest.fixture
def paceline(monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paceline", "train", "draft", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return run


def test_the_command_makes_a_draft_with_a_card(paceline, work):
    code, printed, said = paceline(
        *("--config", str(work / "c.yaml"), "--out", str(work / "out")),
        *("--prompts", str(work / "p.txt"), "--licence", "CC0"),
    )
    assert code == 0, said
    assert "the draft and its card are in" in printed
    for stage in ("12 prompts to train on, 4 held out", "answers: 28 of 28", "features: 24 of 24"):
        assert stage in said
    folder = work / "out" / "draft"
    assert load_head(folder).config.draft_vocab_size == 64
    card = (folder / "README.md").read_text()
    assert "| p.txt | 16 | CC0 |" in card
    assert f"paceline train draft --config {work / 'c.yaml'}" in card
    assert "- `training.run.objective.num_unrolls: 2`" in card
    assert "| answers to given prompts |" in card
    assert "| predicted speed-up of K draft tokens, this draft |" in card
    assert "A tree of 10 nodes, 2-4-4 by depth" in card
    assert "**Extrapolated, not measured:**" in card
    points = [json.loads(x) for x in (work / "out" / "curve.jsonl").read_text().splitlines()]
    assert all(len(point["speed_ups"]["chains"]) == 3 for point in points)
    assert all(point["quality"]["tree_acceptance_length"] >= 1 for point in points)


class Interrupted(BaseException):
    """As abrupt as a signal, as far as one process can be."""


def test_interrupted_anywhere_the_same_command_ends_with_the_same_weights(work):
    report, folder = train(work, "whole")
    assert report.answers.num_texts == 28
    assert report.curve[-1].step > 4
    seen: list[str] = []
    for stage in ("starting", "loading", "solving", "step 0,", "step 4,", "step 8,"):

        def tell(line: str, stage: str = stage) -> None:
            seen.append(line)
            if line.startswith(stage):
                raise Interrupted

        with pytest.raises(Interrupted):
            train(work, "cut", tell)
    lines: list[str] = []
    again, cut = train(work, "cut", lines.append)
    assert any(line.startswith("going on behind step") for line in lines)
    assert not any(line.startswith("starting") for line in lines)
    whole, other = (load_file(of / "model.safetensors") for of in (folder, cut))
    assert all(torch.equal(whole[name], other[name]) for name in whole)
    assert [point.quality for point in again.curve] == [point.quality for point in report.curve]
    states = [torch.load(work / name / "checkpoint.pt") for name in ("whole", "cut")]
    weights = [state["model"] for state in states]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("weights", ["dense", "int8"])
def test_features_are_those_of_the_model_that_answered(work, monkeypatch, weights):
    monkeypatch.setenv("PACELINE_ENGINE__WEIGHTS", weights)
    monkeypatch.setenv("PACELINE_TRAINING__RUN__EPOCHS", "1")
    _, folder = train(work)
    [shard] = (folder.parent / "features" / "held-out").iterdir()
    texts = load_file(shard)
    written = texts["token_ids"][1:][texts["is_answer"][:-1]]
    wanted = texts["wanted"][:-1][texts["is_answer"][:-1]]
    # Held-out answers are greedy; engine and trainer may part where two tokens are as likely.
    assert (written == wanted).float().mean() > 0.95


def test_a_finished_job_does_nothing_more(work):
    report, folder = train(work)
    before = (folder / "model.safetensors").read_bytes()
    again, _ = train(work)
    assert [point.step for point in again.curve] == [point.step for point in report.curve]
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_folder_of_another_job_is_refused(work):
    train(work)
    (work / "p.txt").write_text("".join(f"another {i}\n" for i in range(16)))
    with pytest.raises(ConfigError, match=r"--out: .* another target, prompt set or setting"):
        train(work)


def test_a_full_disk_allowance_leaves_texts_out(work, monkeypatch):
    monkeypatch.setattr("deployments.engine.training.job._TEXTS_PER_SHARD", 5)
    config = load_config(work / "c.yaml")
    features = config.training.features.model_copy(update={"max_bytes": 300_000})
    training = config.training.model_copy(update={"features": features})
    lines: list[str] = []
    report, folder = train(
        work, tell=lines.append, config=config.model_copy(update={"training": training})
    )
    assert report.num_left_out in range(4, 24, 5)
    assert any(line.startswith("warning: ") and "max_bytes" in line for line in lines)
    kept = folder.parent / "features" / "training"
    assert sum(path.stat().st_size for path in kept.iterdir()) <= 300_000
    assert f"{report.num_left_out} texts were left out" in (folder / "README.md").read_text()


def test_held_out_prompts_can_be_named(work):
    (work / "h.jsonl").write_text('{"prompt": "question 3 of some"}\n{"prompt": "else"}\n')
    lines: list[str] = []
    _, folder = train(work, tell=lines.append, held_out_files=[work / "h.jsonl"])
    assert "15 prompts to train on, 2 held out, 1 repeated or too long" in lines
    assert "| h.jsonl (held out) | 2 | not stated |" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--prompts", "nowhere.txt"], "--prompts: nowhere.txt: No such file"),
        (["--licence", "CC0"], "--licence: 1 for 0 files of --prompts"),
        (["--prompts", "one.txt"], "at least one prompt to train on"),
    ],
)
def test_what_cannot_be_is_one_line(paceline, work, monkeypatch, arguments, problem):
    monkeypatch.chdir(work)
    (work / "one.txt").write_text("only one\n")
    code, _, said = paceline("--config", "c.yaml", "--out", "out", *arguments)
    assert code == ConfigError.exit_code
    assert problem in said
    assert "Traceback" not in said


def test_a_model_too_small_for_a_draft_is_refused_before_the_work(work):
    small = write_model(work / "small", num_hidden_layers=4)
    write_job(work, small, **CHANGES)
    with pytest.raises(ConfigError, match="4 layers"):
        train(work)
    assert not (work / "out" / "answers.jsonl").exists()


def test_heads_that_cannot_be_divided_are_told_before_the_work(paceline, work, monkeypatch):
    monkeypatch.setenv("PACELINE_TRAINING__NUM_PROCESSES", "3")
    monkeypatch.setenv("PACELINE_TRAINING__TENSOR_PARALLEL", "3")
    code, _, said = paceline(
        *("--config", str(work / "c.yaml"), "--out", str(work / "out")),
        *("--prompts", str(work / "p.txt")),
    )
    assert code == ConfigError.exit_code
    assert "tensor_parallel: 3 does not divide the target's 4 heads and 2 key-value heads" in said
    assert not (work / "out" / "answers.jsonl").exists()


def test_a_student_of_the_targets_own_chats_is_what_draft_replicas_load(work, monkeypatch):
    for name, value in {
        "METHOD": "student",
        "STUDENT__FIRST_LAYERS": "2",
        "STUDENT__LAST_LAYERS": "2",
        "SELF_CHAT__NUM_TEXTS": "24",
        "SELF_CHAT__NUM_TOGETHER": "16",
        "SELF_CHAT__MAX_TOKENS": "24",
        "SELF_CHAT__MAX_PROMPT_TOKENS": "24",
    }.items():
        monkeypatch.setenv(f"PACELINE_TRAINING__{name}", value)
    lines: list[str] = []
    report, folder = train(work, tell=lines.append, prompt_files=[], licences=[], self_chat=True)
    assert "24 texts of the target's own to train on" in lines
    assert report.is_self_chat
    assert report.features.num_texts == 24 + 4
    assert report.answers.num_texts == 0
    card = (folder / "README.md").read_text()
    assert "24 chats that the target wrote itself" in card
    assert "No data set was used" in card
    assert "the target's first 2 and last 2 layers" in card
    config = load_config(work / "c.yaml")
    student = read_student(folder / "student.safetensors")
    save_student(student, config.cache_dir)
    loaded = load_student(config.engine.model, dtype="float32", cache_dir=config.cache_dir)
    assert loaded.config.num_layers == 4
    # The same command, once more: nothing is left to do.
    again, _ = train(work, prompt_files=[], licences=[], self_chat=True)
    assert again.curve == report.curve


def test_a_chat_that_was_cut_off_goes_on(work, monkeypatch):
    monkeypatch.setattr("deployments.engine.training.job._TEXTS_PER_SHARD", 4)
    for name, value in {
        "NUM_TEXTS": "24",
        "NUM_TOGETHER": "16",
        "MAX_TOKENS": "24",
        "MAX_PROMPT_TOKENS": "24",
    }.items():
        monkeypatch.setenv(f"PACELINE_TRAINING__SELF_CHAT__{name}", value)

    def tell(line: str) -> None:
        if line.startswith("training texts: 2"):
            raise Interrupted

    with pytest.raises(Interrupted):
        train(work, tell=tell, prompt_files=[], licences=[], self_chat=True)
    kept = len(list((work / "out" / "features" / "training").iterdir()))
    assert kept >= 1
    report, _ = train(work, prompt_files=[], licences=[], self_chat=True)
    assert report.features.num_texts == 24 + 4


def online(monkeypatch):
    monkeypatch.setenv("PACELINE_TRAINING__FEATURES__MODE", "online")


def test_online_features_make_the_same_draft_and_touch_no_disk(work, monkeypatch):
    _, stored = train(work, "offline")
    online(monkeypatch)
    report, streamed = train(work, "online")
    whole, other = (load_file(of / "model.safetensors") for of in (stored, streamed))
    assert all(torch.equal(whole[name], other[name]) for name in whole)
    assert report.queue.num_taken == report.queue.num_put == 3 * 24
    assert 0 < report.queue.most_bytes <= report.queue.max_bytes
    assert report.num_left_out == 0
    assert not list((work / "online" / "features" / "texts").iterdir())
    assert "through memory: 72 texts" in (streamed / "README.md").read_text()


def test_an_online_training_that_was_cut_off_ends_with_the_same_weights(work, monkeypatch):
    online(monkeypatch)
    _, folder = train(work, "whole")

    def tell(line: str) -> None:
        if line.startswith("step 4,"):
            raise Interrupted

    with pytest.raises(Interrupted):
        train(work, "cut", tell)
    lines: list[str] = []
    report, cut = train(work, "cut", lines.append)
    assert any(line.startswith("going on behind step") for line in lines)
    # What had been trained on is not computed again.
    assert report.queue.num_put < 3 * 24
    whole, other = (load_file(of / "model.safetensors") for of in (folder, cut))
    assert all(torch.equal(whole[name], other[name]) for name in whole)


def grouped(monkeypatch):
    online(monkeypatch)
    monkeypatch.setenv("PACELINE_TRAINING__FEATURES__GROUP_TEXTS", "8")
    monkeypatch.setenv("PACELINE_TRAINING__RUN__EVALUATE_STEPS", "1")


def test_training_begins_before_the_last_answer_is_written(work, monkeypatch):
    grouped(monkeypatch)
    has_trained = Event()
    append = AnswerLog.append

    def held(log, index, token_ids):
        # 4 to hold out and 8 of the first group are answered by then; 28 are wanted.
        assert len(log.answers) < 20 or has_trained.wait(120)
        append(log, index, token_ids)

    def tell(line: str) -> None:
        if line.startswith("step 1,"):
            has_trained.set()

    monkeypatch.setattr(AnswerLog, "append", held)
    report, folder = train(work, "beside", tell)
    assert report.answers.num_texts == 28
    assert report.num_left_out == 0
    # What was answered before makes the same draft.
    (work / "behind").mkdir()
    shutil.copy(work / "beside" / "answers.jsonl", work / "behind")
    lines: list[str] = []
    again, other = train(work, "behind", lines.append)
    assert not any(line.startswith("starting") for line in lines)
    assert [point.quality for point in again.curve] == [point.quality for point in report.curve]
    weights = [load_file(of / "model.safetensors") for of in (folder, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_cut_off_while_answers_are_written_it_ends_with_the_same_weights(work, monkeypatch):
    grouped(monkeypatch)
    monkeypatch.setenv("PACELINE_TRAINING__RUN__CHECKPOINT_STEPS", "1")
    train(work, "whole")
    for stage in ("starting", "step 0,", "step 2,"):

        def tell(line: str, stage: str = stage) -> None:
            if line.startswith(stage):
                raise Interrupted

        with pytest.raises(Interrupted):
            train(work, "cut", tell)
    lines: list[str] = []
    train(work, "cut", lines.append)
    assert any(line.startswith("going on behind step") for line in lines)
    states = [torch.load(work / name / "checkpoint.pt")["model"] for name in ("whole", "cut")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_answer_that_cannot_be_kept_ends_the_training_that_waits_for_it(work, monkeypatch):
    grouped(monkeypatch)
    append = AnswerLog.append

    def full(log, index, token_ids):
        if len(log.answers) == 14:
            raise OSError("no space left")
        append(log, index, token_ids)

    monkeypatch.setattr(AnswerLog, "append", full)
    with pytest.raises(OSError, match="no space left"):
        train(work)
    assert not any(thread.name == "answers" for thread in threading.enumerate())


def test_a_chat_with_oneself_goes_in_no_groups(work, monkeypatch):
    grouped(monkeypatch)
    with pytest.raises(ConfigError, match="group_texts: not with --self-chat"):
        train(work, prompt_files=[], licences=[], self_chat=True)
    monkeypatch.setenv("PACELINE_TRAINING__FEATURES__MODE", "offline")
    with pytest.raises(ConfigError, match="group_texts is for mode: online"):
        load_config(work / "c.yaml")


def test_the_targets_own_chats_are_streamed_too(work, monkeypatch):
    online(monkeypatch)
    for name, value in {
        "NUM_TEXTS": "24",
        "NUM_TOGETHER": "16",
        "MAX_TOKENS": "24",
        "MAX_PROMPT_TOKENS": "24",
    }.items():
        monkeypatch.setenv(f"PACELINE_TRAINING__SELF_CHAT__{name}", value)
    report, folder = train(work, prompt_files=[], licences=[], self_chat=True)
    assert report.queue.num_taken == 3 * 24
    assert report.num_left_out == 0
    [shard] = (folder.parent / "features" / "texts").iterdir()
    assert load_file(shard)["features"].numel() == 0


def test_given_step_times_are_taken_and_nothing_is_measured(work, monkeypatch):
    monkeypatch.setenv("PACELINE_TRAINING__COSTS__TARGET_STEP_S", "{1: 0.03, 11: 0.04}")
    monkeypatch.setenv("PACELINE_TRAINING__COSTS__DRAFT_STEP_S", "{1: 0.001}")
    report, _ = train(work)
    assert report.costs.target_s == {1: 0.03, 11: 0.04}
    length = report.best.quality.mean_acceptance_length[0]
    assert report.best.speed_ups.chains[0] == pytest.approx(length * 0.03 / 0.032)


def test_what_contradicts_a_chat_with_oneself_is_refused(work, monkeypatch):
    with pytest.raises(ConfigError, match="--self-chat: takes no --prompts"):
        train(work, self_chat=True)
    with pytest.raises(ConfigError, match="no --licence"):
        train(work, prompt_files=[], self_chat=True)
    with pytest.raises(ConfigError, match=r"training\.self_chat: texts of up to 385 tokens"):
        train(work, prompt_files=[], licences=[], self_chat=True)
    monkeypatch.setenv("PACELINE_TRAINING__SELF_CHAT__MAX_TOKENS", "8")
    monkeypatch.setenv("PACELINE_TRAINING__SELF_CHAT__MAX_PROMPT_TOKENS", "16")
    monkeypatch.setattr(Tokenizer, "has_chat_template", False)
    with pytest.raises(ConfigError, match="--self-chat: the model has no chat template"):
        train(work, "other", prompt_files=[], licences=[], self_chat=True)
