"""Whose prompts are kept, in what form, and how many of them."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from pydantic import ValidationError

from cluster.config import ClusterConfig
from cluster.training_prompts import read_prompts
from deployments import traffic_log
from deployments.config import TrafficLogConfig
from deployments.tokenizer import ChatTurn, Tokenizer
from deployments.traffic_log import TrafficLog
from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TURNS = [ChatTurn("system", "Be brief."), ChatTurn("user", "line\u2028one\ntwo")]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is checked here is what was written, not how fast a disk is."""
    monkeypatch.setattr(traffic_log, "_CLOSE_TIMEOUT_S", 60.0)


def log_to(folder: Path, *tenants: str, **settings: int) -> tuple[TrafficLog, Counter[str]]:
    results: Counter[str] = Counter()
    config = TrafficLogConfig(tenants=tenants, folder=folder, **settings)
    return TrafficLog(config, lambda result: results.update([result])), results


def lines_of(folder: Path) -> list[str]:
    return [
        line for path in sorted(folder.rglob("*.jsonl")) for line in path.read_text().split("\n")
    ]


def test_only_who_consented_is_kept_and_nothing_but_the_messages(tmp_path: Path) -> None:
    folder = tmp_path / "traffic"
    log, results = log_to(folder, "acme")
    log.record("acme", TURNS)
    log.record("other", [ChatTurn("user", "secret")])
    log.close()
    (path,) = folder.rglob("*.jsonl")
    assert path.parent == folder / "acme"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert lines_of(folder) == [
        json.dumps({"messages": [{"role": r, "content": c} for r, c in TURNS]}),
        "",
    ]
    assert results == {"kept": 1}


def test_by_default_there_is_no_log_and_no_thread() -> None:
    log = TrafficLog(TrafficLogConfig(), lambda result: pytest.fail(result))
    log.record("default", TURNS)
    assert not [t for t in threading.enumerate() if t.name == "traffic-log" and t.is_alive()]
    log.close()


def test_a_tenants_folder_stays_below_its_bound_and_keeps_the_newest(tmp_path: Path) -> None:
    log, results = log_to(tmp_path, "a", "b", max_tenant_bytes=64 << 10)
    log.record("b", TURNS)
    for number in range(400):
        log.record("a", [ChatTurn("user", f"{number} " + "x" * 1000)])
    log.close()
    assert results == {"kept": 401}
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir())
    assert 48 << 10 < size <= 64 << 10
    numbers = [
        int(json.loads(line)["messages"][0]["content"].split()[0])
        for line in lines_of(tmp_path / "a")
        if line
    ]
    assert numbers == list(range(400 - len(numbers), 400))
    assert len(lines_of(tmp_path / "b")) == 2


def test_files_of_another_process_count_and_go_first(tmp_path: Path) -> None:
    old = tmp_path / "a" / f"{0:020d}-1.jsonl"
    old.parent.mkdir()
    old.write_text("x" * (60 << 10))
    log, _ = log_to(tmp_path, "a", max_tenant_bytes=64 << 10)
    log.record("a", TURNS)
    log.close()
    assert not old.exists()
    assert len(lines_of(tmp_path)) == 2


def test_what_is_too_long_or_cannot_be_written_is_dropped_and_counted(tmp_path: Path) -> None:
    log, results = log_to(tmp_path / "t", "a", "b", max_tenant_bytes=64 << 10)
    log.record("a", [ChatTurn("user", "x" * 9000)])
    # It was not even queued.
    assert results == {"dropped": 1}
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "b").write_text("a file where the folder should be")
    log.record("b", TURNS)
    log.record("a", TURNS)
    log.close()
    assert results == {"dropped": 2, "kept": 1}


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def short(descriptor: int, line: bytes) -> int:
        return write(descriptor, line[:9] if b"second" in line else line)

    monkeypatch.setattr(os, "write", short)
    log, results = log_to(tmp_path, "a")
    for text in ("first", "second", "third"):
        log.record("a", [ChatTurn("user", text)])
    log.close()
    assert results == {"kept": 2, "dropped": 1}
    *rows, end = lines_of(tmp_path)
    assert [json.loads(row)["messages"][0]["content"] for row in rows] == ["first", "third"]
    assert not end


def test_a_writer_that_is_held_up_has_no_more_before_it_than_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_log, "_MAX_QUEUED_CHARS", 32 << 10)
    results: Counter[str] = Counter()
    may_go_on = threading.Event()

    def note(result: str) -> None:
        if result == "kept":
            may_go_on.wait(60)
        results.update([result])

    log = TrafficLog(TrafficLogConfig(tenants=("a",), folder=tmp_path), note)
    for _ in range(10):
        log.record("a", [ChatTurn("user", "x" * 9000)])
    assert results == {"dropped": 7}
    may_go_on.set()
    log.close()
    assert results == {"dropped": 7, "kept": 3}


def test_the_training_reads_the_folder_as_it_is(tmp_path: Path) -> None:
    log, _ = log_to(tmp_path / "t", "a", "b")
    for tenant in ("a", "b"):
        log.record(tenant, TURNS)
    log.close()
    tokenizer = Tokenizer.load(write_tokenizer(tmp_path / "model"))
    source = read_prompts(tmp_path / "t", "own", tokenizer, "--prompts")
    assert source.prompts == (tuple(tokenizer.encode_chat(TURNS)),) * 2
    alone = read_prompts(tmp_path / "t" / "a", "own", tokenizer, "--prompts")
    assert alone.prompts == source.prompts[:1]


def test_consent_needs_a_folder_and_a_tenant_that_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="no folder"):
        TrafficLogConfig(tenants=("a",))
    log = {"tenants": ["default"], "folder": str(tmp_path)}
    assert ClusterConfig.model_validate({"ingress": {"traffic_log": log}})
    with pytest.raises(ValidationError, match="names acme; tenants are default"):
        ClusterConfig.model_validate({"ingress": {"traffic_log": log | {"tenants": ["acme"]}}})
