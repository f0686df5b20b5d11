"""The reader of KV events, without sockets: batches lost, asked for again, and lost for good."""

from __future__ import annotations

import json
import queue
from pathlib import Path

import pytest

from deployments.engine.sglang_engine import kv_events
from deployments.engine.sglang_engine.kv_events import Batch, EventReader
from tests.ray_cluster import wait_until

PATIENT_S = 60


class Held:
    """What it was told, in order."""

    def __init__(self):
        self.heard = []

    def apply(self, events):
        self.heard += events

    def lost(self):
        self.heard.append("lost")


class Source:
    """A publisher that keeps ``kept`` and says what a test puts in."""

    def __init__(self):
        self.live: queue.Queue[Batch | Exception] = queue.Queue()
        self.kept: list[Batch] | None = []
        self.asked: list[int] = []
        self.is_closed = False

    def receive(self, timeout_s):
        try:
            item = self.live.get(timeout=min(timeout_s, 0.01))
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def replay(self, first):
        self.asked.append(first)
        if self.kept is None:
            return None
        return [batch for batch in self.kept if batch.number >= first]

    def close(self):
        self.is_closed = True


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def held(source):
    held = Held()
    reader = EventReader(lambda: source, held)
    yield held
    reader.close()
    assert source.is_closed


def hears(held, *expected):
    wait_until(lambda: held.heard == list(expected), timeout_s=PATIENT_S, what=str(expected))


def test_batches_are_applied_once_and_in_order(source, held):
    for number in (0, 1, 1, 2):
        source.live.put(Batch(number, [f"e{number}"]))
    hears(held, "e0", "e1", "e2")
    assert 0 not in source.asked


def test_a_gap_is_filled_with_what_is_kept(source, held):
    source.kept = [Batch(n, [f"e{n}"]) for n in range(4)]
    source.live.put(Batch(3, ["e3"]))
    hears(held, "e0", "e1", "e2", "e3")


def test_a_gap_that_is_not_kept_is_a_loss(source, held):
    source.kept = [Batch(n, [f"e{n}"]) for n in (2, 3)]
    source.live.put(Batch(3, ["e3"]))
    hears(held, "lost", "e2", "e3")


def test_a_gap_that_nobody_answers_for_is_a_loss(source, held):
    source.kept = None
    source.live.put(Batch(3, ["e3"]))
    hears(held, "lost", "e3")


def test_the_last_batch_is_asked_for_where_nothing_comes_behind_it(source, held, monkeypatch):
    monkeypatch.setattr(kv_events, "_QUIET_S", 0.0)
    source.kept = [Batch(0, ["e0"])]
    hears(held, "e0")


def test_an_event_that_cannot_be_read_leaves_nothing_certain(source, held):
    source.live.put(Batch(0, ["e0"]))
    source.live.put(ValueError("not msgpack"))
    hears(held, "e0", "lost")


def test_a_source_that_cannot_be_opened_leaves_nothing_certain():
    def refuse():
        raise OSError("too many open files")

    held = Held()
    reader = EventReader(refuse, held)
    hears(held, "lost")
    reader.close()


def test_the_publisher_keeps_no_more_than_can_be_queued():
    settings = json.loads(kv_events.publisher_settings(Path("/folder")))
    assert settings["publisher"] == "zmq"
    assert settings["endpoint"] != settings["replay_endpoint"]
    assert settings["buffer_steps"] <= 1000
