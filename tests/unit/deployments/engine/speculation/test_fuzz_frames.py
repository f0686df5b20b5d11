import pytest

from deployments.engine.speculation import wire
from deployments.engine.speculation.draft_service import DraftService
from deployments.engine.speculation.types import DraftTree
from tests.fuzz import frames


def test_damaged_frames_end_nothing_and_every_kind_of_outcome_occurs():
    outcomes = frames.run(3000, seed=1)
    assert sum(outcomes.values()) >= 3000
    assert min(outcomes.values()) > 100


def test_the_same_seed_gives_the_same_inputs():
    assert frames.run(300, seed=2) == frames.run(300, seed=2)


def test_a_drafter_that_is_asked_anything_is_found_out(monkeypatch):
    monkeypatch.setattr(wire, "check_token_ids", lambda *_: None)
    with pytest.raises(frames.BrokenPromiseError):
        frames.run(3000)


def test_a_tree_that_nobody_checked_is_found_out(monkeypatch):
    def careless(message, _):
        return DraftTree(
            tuple(message.in_flight_token_ids),
            tuple(parent - 1 for parent in message.in_flight_parents),
        )

    monkeypatch.setattr(wire, "in_flight_from_wire", careless)
    with pytest.raises(frames.BrokenPromiseError):
        frames.run(3000)


def test_sessions_that_are_never_forgotten_are_found_out(monkeypatch):
    def forget(service, key, _):
        service._sessions.pop(key, None)
        service._pending.pop(key, None)

    monkeypatch.setattr(DraftService, "_forget", forget)
    with pytest.raises(frames.BrokenPromiseError, match="leak"):
        frames.run(3000)


def test_a_service_that_goes_down_is_found_out(monkeypatch):
    monkeypatch.setattr(DraftService, "_drop", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        frames.run(3000)
