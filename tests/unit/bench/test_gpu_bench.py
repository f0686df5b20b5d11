"""What ``make bench-gpu`` does without a GPU, and its arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.engine.config import EngineConfig
from tests.bench.gpu import __main__ as bench
from tests.bench.gpu.field import (
    EAGLE3,
    PLAIN,
    REMOTE,
    REMOTE_TIER,
    STANDALONE,
    Machine,
    all_entries,
    engine_settings,
)
from tests.bench.gpu.model import Target
from tests.bench.gpu.report import add_speed_ups
from tests.bench.gpu.stages import Plan, measure

FOLDER = Path("/models/one")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.delenv("SGLANG_PYTHON", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    return bench.main()


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"sglang": "0.5.23", "torch": "2.14.1", "cuda": "13.0", "device": None}

    def answer(*_: object, **__: object) -> Any:
        return SimpleNamespace(returncode=0, stdout=f"a warning\n{json.dumps(found)}\n")

    monkeypatch.setattr(subprocess, "run", answer)
    assert run(monkeypatch, "--python", "/p") == 3
    assert capsys.readouterr().out.startswith("no CUDA device: ")


def test_without_sglang_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 2
    assert run(monkeypatch, "--python", "/there/is/none") == 2
    assert capsys.readouterr().out.count("no SGLang: ") == 2


def test_drafters_of_sglangs_own_take_part_where_their_files_are() -> None:
    assert [entry.name for entry in all_entries(None, None, 4)] == [PLAIN, REMOTE, REMOTE_TIER]
    named = {entry.name: entry for entry in all_entries(FOLDER, FOLDER, 4)}
    assert list(named) == [PLAIN, EAGLE3, STANDALONE, REMOTE, REMOTE_TIER]
    # SGLang counts the last committed token as well.
    assert (named[EAGLE3].extra_args or {})["speculative_num_draft_tokens"] == 5


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_settings_are_a_clusters(device: str) -> None:
    target = Target("t", FOLDER, is_random=True, is_default=False)
    for entry in all_entries(FOLDER, FOLDER, 4):
        settings = engine_settings(entry, target, Machine(FOLDER, device, 0.7), 4)
        config = EngineConfig.model_validate(settings)
        assert config.device == device
        assert config.speculation.enabled == entry.is_drafted
        assert config.sglang.extra_args["load_format"] == "dummy"


class Contestant:
    """Gives two tokens a step; a long prompt comes from the tier the second time."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def ask(self, do: str, prompts: Any = (), num_new_tokens: int = 0) -> Any:
        if do == "num_saved":
            return sum(length // 64 for length in self.asked)
        if do == "flush":
            return True
        lengths = [len(prompt) for prompt in prompts]
        is_known = lengths[0] in self.asked
        self.asked += lengths
        answer = {
            "token_ids": [7] * num_new_tokens,
            "num_first": 2,
            "num_steps": (num_new_tokens - 2) // 2,
            "first_s": 0.5 if is_known else 1.0,
            "num_tier_cached": lengths[0] if is_known else 0,
        }
        return {"took_s": 2.0, "answers": [answer] * len(prompts)}


def test_rows_say_what_was_answered() -> None:
    lengths = iter(range(1, 1000))
    said: list[str] = []
    rows = measure(
        Contestant(),  # type: ignore[arg-type]
        all_entries(None, None, 4)[-1],
        Plan.quick(),
        lambda _: [1] * next(lengths),
        said.append,
    )
    speeds = [row for row in rows if row["tokens_per_s"]]
    assert [(row["batch"], row["tokens_per_s"]) for row in speeds] == [(1, 6.0), (2, 12.0)]
    assert {row["tokens_per_step"] for row in speeds} == {2.0}
    first, again = rows[-2:]
    assert (first["first_token_s"], first["tier_tokens"]) == (1.0, 0)
    assert (again["first_token_s"], again["tier_tokens"]) == (0.5, 400)
    assert len(said) == len(rows)


def test_rows_are_compared_with_plain_ones() -> None:
    rows = [
        {"contestant": name, "what": what, "batch": 1, "tokens_per_s": speed, "first_token_s": wait}
        for name, what, speed, wait in (
            (PLAIN, "q", 10.0, 1.0),
            (REMOTE, "q", 15.0, 1.0),
            (PLAIN, "long", 0.0, 3.0),
            (REMOTE, "long", 0.0, 1.0),
        )
    ]
    add_speed_ups(rows)
    assert [row["of_plain"] for row in rows] == [1.0, 1.5, 1.0, 3.0]
