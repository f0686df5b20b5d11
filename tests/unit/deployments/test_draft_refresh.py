"""A replica that follows a shelf of students, with drafters that need no model."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from deployments.draft_refresh import DraftRefresh
from deployments.engine.config import CanaryConfig
from deployments.engine.errors import WeightsMismatchError, WeightsMissingError
from deployments.engine.speculation.canary import DrafterRole, Tally
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.drafters.canary import CanaryDrafter
from deployments.engine.torch_engine.student_shelf import Decision, StudentShelf
from tests.fakes_speculation import VOCAB_SIZE, query_of, spec_of

if TYPE_CHECKING:
    from pathlib import Path

RULE = CanaryConfig(share=0.9, min_sessions=5, min_rounds=50, max_sessions=200)
WITHDRAWN = Decision(outcome="withdrawn", reason="by hand", decided_at=0.0)


class OfFile(Drafter):
    """Stands for the student in a file."""

    def __init__(self, text: str) -> None:
        self.text = text

    def propose(self, queries):
        if self.text == "fails":
            raise ZeroDivisionError
        return [[] for _ in queries]


class Replica:
    """What a draft replica is to the code under test."""

    vocab_size = VOCAB_SIZE

    def __init__(self, shelf: StudentShelf) -> None:
        self.shelf = shelf
        self.loaded: list[str] = []
        self.drafters: list[Drafter] = []
        self.outcomes: list[str] = []
        self.is_on_trial = False
        self.failures: list[Exception] = []
        self.refresh = DraftRefresh(
            self,
            shelf,
            OfFile("stable"),
            build=self.build,
            rule=RULE,
            metrics=SimpleNamespace(trial=self.trial, decided=self.outcomes.append),
        )

    def build(self, path: Path) -> Drafter:
        if self.failures:
            raise self.failures.pop()
        text = path.read_text()
        if text == "damaged":
            raise WeightsMismatchError("damaged")
        if text == "huge":
            raise MemoryError
        self.loaded.append(text)
        return OfFile(text)

    def replace_drafter(self, successor: Drafter) -> None:
        self.drafters.append(successor)

    def trial(self, *, is_running: bool) -> None:
        self.is_on_trial = is_running

    def poll(self) -> str | None:
        """What drafts afterwards; None for two."""
        self.refresh.poll()
        drafter = self.drafters[-1] if self.drafters else OfFile("stable")
        return drafter.text if isinstance(drafter, OfFile) else None

    def shows(self, stable: float, candidate: float, num_sessions: int) -> None:
        trial = self.drafters[-1]
        assert isinstance(trial, CanaryDrafter)
        for role, score in ((DrafterRole.STABLE, stable), (DrafterRole.CANDIDATE, candidate)):
            tally = Tally()
            for number in range(num_sessions):
                tally = tally.plus(20, round(20 * score) + number % 3)
            trial.tallies[role] = tally


@pytest.fixture
def shelf(tmp_path):
    shelf = StudentShelf(tmp_path / "cache", "d1gest")
    shelf.stable.parent.mkdir(parents=True)
    shelf.stable.write_text("stable")
    return shelf


@pytest.fixture
def offer(shelf, tmp_path):
    def offer(text: str) -> None:
        source = tmp_path / "source"
        source.write_text(text)
        shelf.offer(source)

    return offer


def raiser(failure: Exception):
    def fail(*_):
        raise failure

    return fail


def test_without_a_candidate_nothing_happens(shelf):
    replica = Replica(shelf)
    assert replica.poll() == "stable"
    assert (replica.loaded, replica.drafters) == ([], [])


def test_a_better_candidate_is_tried_and_then_drafts_for_all(shelf, offer):
    replica = Replica(shelf)
    offer("new")
    assert replica.poll() is None
    assert replica.is_on_trial
    replica.shows(stable=0.2, candidate=0.9, num_sessions=4)
    assert replica.poll() is None
    replica.shows(stable=0.2, candidate=0.9, num_sessions=30)
    assert replica.poll() == "new"
    assert not replica.is_on_trial
    assert replica.loaded == ["new"]  # once, for the trial
    assert replica.outcomes == ["promoted"]
    assert shelf.in_use().read_text() == "new"
    assert shelf.last_decision().reason.startswith("better: candidate 0.9")


def test_a_worse_candidate_is_rolled_back(shelf, offer):
    replica = Replica(shelf)
    offer("bad")
    replica.poll()
    replica.shows(stable=0.9, candidate=0.2, num_sessions=30)
    assert replica.poll() == "stable"
    assert replica.outcomes == ["rolled_back"]
    assert shelf.in_use().read_text() == "stable"
    assert shelf.last_decision().reason.startswith("worse")
    # The next one is judged by what it does itself.
    offer("new")
    assert replica.poll() is None
    assert replica.poll() is None


def test_a_candidate_that_fails_is_rolled_back_at_once(shelf, offer):
    replica = Replica(shelf)
    offer("fails")
    replica.poll()
    trial = replica.drafters[-1]
    numbers = range(20)
    for number in numbers:
        trial.open(spec_of(number, [1, 2]))
    assert trial.propose([query_of(number, [1, 2]) for number in numbers]) == [[]] * 20
    assert replica.poll() == "stable"
    assert shelf.last_decision().reason == "it failed: OfFile raised ZeroDivisionError"


@pytest.mark.parametrize(("text", "reason"), [("damaged", "damaged"), ("huge", "MemoryError")])
def test_a_candidate_that_does_not_fit_never_drafts(shelf, offer, text, reason):
    replica = Replica(shelf)
    offer(text)
    assert replica.poll() == "stable"
    assert replica.drafters == []
    assert not shelf.candidate.exists()
    assert shelf.last_decision().reason == f"it cannot be loaded: {reason}"


def test_replicas_follow_the_one_that_decided_first(shelf, offer):
    first, second = Replica(shelf), Replica(shelf)
    offer("new")
    assert first.poll() is second.poll() is None
    first.shows(stable=0.2, candidate=0.9, num_sessions=30)
    second.shows(stable=0.9, candidate=0.2, num_sessions=30)
    assert first.poll() == second.poll() == "new"
    assert second.outcomes == []
    assert shelf.last_decision().outcome == "promoted"
    assert shelf.roll_back(WITHDRAWN) is not None
    assert first.poll() == second.poll() == "stable"
    assert first.loaded == second.loaded == ["new", "stable"]


def test_a_trial_that_is_withdrawn_ends(shelf, offer):
    replica = Replica(shelf)
    offer("new")
    replica.poll()
    shelf.roll_back(WITHDRAWN)
    assert replica.poll() == "stable"
    assert not replica.is_on_trial


def test_a_newer_candidate_takes_the_place_of_the_one_on_trial(shelf, offer):
    replica = Replica(shelf)
    offer("new")
    replica.poll()
    replica.shows(stable=0.2, candidate=0.9, num_sessions=30)
    offer("newer")
    assert replica.poll() is None
    assert replica.loaded == ["new", "newer"]
    assert shelf.candidate.read_text() == "newer"


def test_a_newer_candidate_that_does_not_fit_ends_the_trial_before_it(shelf, offer):
    replica = Replica(shelf)
    offer("new")
    replica.poll()
    offer("damaged")
    assert replica.poll() == "stable"
    assert not replica.is_on_trial


def test_a_candidate_whose_replicas_die_is_not_tried_for_ever(shelf, offer):
    offer("new")
    for _ in range(20):
        assert Replica(shelf).poll() is None
    last = Replica(shelf)
    assert last.poll() == "stable"
    assert last.loaded == []
    assert shelf.last_decision().reason == "begun 20 times, never ended"
    offer("newer")
    assert last.poll() is None


NOT_NOW = [OSError(errno.EMFILE, "too many open files"), WeightsMissingError("no target")]


@pytest.mark.parametrize("failure", NOT_NOW)
def test_a_candidate_that_cannot_be_read_now_is_begun_once_and_tried_again(shelf, offer, failure):
    replica, other = Replica(shelf), Replica(shelf)
    offer("new")
    replica.failures = [failure] * 30
    for _ in range(30):
        with pytest.raises(type(failure)):
            replica.poll()
    assert shelf.candidate.exists()
    assert replica.poll() is other.poll() is None
    assert shelf.begin() == 3


def test_a_begin_that_cannot_be_written_down_is_tried_again(shelf, offer, monkeypatch):
    replica = Replica(shelf)
    offer("new")
    with monkeypatch.context() as patched:
        patched.setattr(shelf, "begin", raiser(OSError(errno.ENOSPC, "no space")))
        with pytest.raises(OSError, match="no space"):
            replica.poll()
    assert replica.poll() is None


@pytest.mark.parametrize("failure", [*NOT_NOW, MemoryError()])
def test_a_stable_student_that_cannot_be_read_now_is_taken_up_later(shelf, failure):
    replica = Replica(shelf)
    shelf.stable.unlink()
    shelf.stable.write_text("newer")
    replica.failures = [failure]
    with pytest.raises(type(failure)):
        replica.poll()
    assert replica.poll() == "newer"


def test_a_stable_student_that_cannot_be_loaded_is_not_taken_up(shelf, offer):
    replica = Replica(shelf)
    shelf.stable.unlink()
    shelf.stable.write_text("damaged")
    assert replica.poll() == "stable"
    assert replica.poll() == "stable"
    assert replica.drafters == []
