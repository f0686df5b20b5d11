"""Files that come and go; the students in them are of no concern here."""

from __future__ import annotations

from pathlib import Path

import pytest

from deployments.engine.errors import WeightsMissingError
from deployments.engine.torch_engine.student_shelf import Decision, StudentShelf, stamp_of

PROMOTED = Decision(outcome="promoted", reason="better", decided_at=1.0)
REJECTED = Decision(outcome="rolled_back", reason="worse", decided_at=2.0)
WITHDRAWN = Decision(outcome="withdrawn", reason="by hand", decided_at=3.0)


@pytest.fixture
def shelf(tmp_path):
    return StudentShelf(tmp_path / "cache", "d1gest")


def offered(shelf, tmp_path, text):
    source = tmp_path / "new.safetensors"
    source.write_text(text)
    shelf.offer(source)
    return stamp_of(shelf.candidate)


def test_a_promoted_candidate_drafts_and_the_one_before_can_come_back(shelf, tmp_path):
    with pytest.raises(WeightsMissingError):
        shelf.in_use()
    first = offered(shelf, tmp_path, "first")
    assert shelf.promote(first, PROMOTED)
    assert stamp_of(shelf.in_use()) == first
    assert shelf.last_decision() == PROMOTED
    second = offered(shelf, tmp_path, "second")
    assert shelf.last_decision() is None
    assert shelf.promote(second, PROMOTED)
    assert shelf.in_use().read_text() == "second"
    assert not shelf.candidate.exists()
    assert shelf.roll_back(WITHDRAWN) == shelf.in_use()
    assert shelf.in_use().read_text() == "first"
    assert shelf.last_decision() == WITHDRAWN


def test_a_student_drafts_whenever_a_promotion_dies(shelf, tmp_path, monkeypatch):
    shelf.promote(offered(shelf, tmp_path, "first"), PROMOTED)
    second = offered(shelf, tmp_path, "second")
    move = Path.replace

    def dies(source, target):
        if target == shelf.stable:
            raise OSError("power is gone")
        return move(source, target)

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(OSError, match="power is gone"):
        shelf.promote(second, PROMOTED)
    assert shelf.in_use().read_text() == "first"
    assert shelf.last_decision() is None
    monkeypatch.undo()
    assert shelf.promote(second, PROMOTED)
    assert shelf.in_use().read_text() == "second"
    assert shelf.roll_back(WITHDRAWN).read_text() == "first"


def test_a_rejected_candidate_changes_nothing(shelf, tmp_path):
    first = offered(shelf, tmp_path, "first")
    shelf.promote(first, PROMOTED)
    assert shelf.reject(offered(shelf, tmp_path, "second"), REJECTED)
    assert stamp_of(shelf.in_use()) == first
    assert not shelf.candidate.exists()
    assert shelf.last_decision() == REJECTED


@pytest.mark.parametrize("end", ["promote", "reject"])
def test_a_decision_about_a_candidate_that_was_replaced_is_void(shelf, tmp_path, end):
    late = offered(shelf, tmp_path, "late")
    newer = offered(shelf, tmp_path, "newer")
    assert not getattr(shelf, end)(late, PROMOTED)
    assert stamp_of(shelf.candidate) == newer
    assert shelf.last_decision() is None
    # The other replica's decision comes second.
    assert shelf.promote(newer, PROMOTED)
    assert not getattr(shelf, end)(newer, REJECTED)
    assert shelf.last_decision() == PROMOTED


def test_a_rollback_ends_a_trial_first(shelf, tmp_path):
    for text in ("first", "second"):
        shelf.promote(offered(shelf, tmp_path, text), PROMOTED)
    offered(shelf, tmp_path, "third")
    shelf.roll_back(WITHDRAWN)
    assert not shelf.candidate.exists()
    assert shelf.in_use().read_text() == "second"
    shelf.roll_back(WITHDRAWN)
    assert shelf.in_use().read_text() == "first"


def test_without_one_before_the_shipped_student_comes_back(shelf, tmp_path, monkeypatch):
    from deployments.engine.torch_engine import student

    assert shelf.roll_back(WITHDRAWN) is None
    assert shelf.promote(offered(shelf, tmp_path, "only"), PROMOTED)
    # Nothing would be left to draft with.
    assert shelf.roll_back(WITHDRAWN) is None
    shelf.stable.unlink()
    (tmp_path / "d1gest.safetensors").write_text("shipped")
    monkeypatch.setattr(student, "_SHIPPED", tmp_path)
    assert shelf.promote(offered(shelf, tmp_path, "own"), PROMOTED)
    assert shelf.in_use().read_text() == "own"
    assert shelf.roll_back(WITHDRAWN) == tmp_path / "d1gest.safetensors"
    assert shelf.in_use().read_text() == "shipped"


def test_an_offer_that_cannot_be_read_leaves_nothing(shelf, tmp_path):
    with pytest.raises(FileNotFoundError):
        shelf.offer(tmp_path / "nowhere")
    assert list(shelf.stable.parent.iterdir()) == []
