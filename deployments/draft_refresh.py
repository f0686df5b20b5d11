"""A draft replica's part in the refresh of its students: trials, promotion, rollback.

The replica follows the shelf of its target's students (``student_shelf``). A candidate that appears
there drafts for a share of the sessions; what the replica finds out about it, it writes down there,
and all replicas that see the shelf follow. Whatever happens here costs guesses, never a request.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from deployments.engine.errors import WeightsMismatchError, WeightsMissingError
from deployments.engine.speculation.canary import DrafterRole, Outcome, judge
from deployments.engine.speculation.drafters.canary import CanaryDrafter
from deployments.engine.torch_engine.student_shelf import Decision, stamp_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Protocol

    from deployments.draft_metrics import DraftMetrics
    from deployments.engine.config import CanaryConfig
    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.torch_engine.student_shelf import FileStamp, StudentShelf

    class ServesDrafts(Protocol):
        """The part of a ``DraftServer`` that matters here."""

        @property
        def vocab_size(self) -> int:
            """Of its targets."""

        def replace_drafter(self, successor: Drafter) -> None:
            """Draft with another one."""


logger = logging.getLogger(__name__)

_MAX_BEGUN = 20
"""Trials of one candidate, by replicas that came and went. It may be what they die of."""


class DraftRefresh:
    """Belongs to one thread, for loading a student takes seconds.

    Args:
        server: drafts with ``stable``.
        shelf: of the target.
        stable: the drafter built from ``shelf.in_use()``.
        build: makes a drafter of a student's file.
        rule: of the trials.
        metrics: told how trials end.
    """

    def __init__(
        self,
        server: ServesDrafts,
        shelf: StudentShelf,
        stable: Drafter,
        *,
        build: Callable[[Path], Drafter],
        rule: CanaryConfig,
        metrics: DraftMetrics,
    ) -> None:
        self._server = server
        self._shelf = shelf
        self._stable = stable
        self._stable_stamp = stamp_of(shelf.in_use())
        self._build = build
        self._rule = rule
        self._metrics = metrics
        self._candidate: Drafter | None = None
        self._candidate_stamp: FileStamp | None = None
        self._begun_stamp: FileStamp | None = None
        self._trial: CanaryDrafter | None = None

    def poll(self) -> None:
        """Follow the shelf, and judge the candidate on trial; called every few seconds.

        Raises:
            OSError: a file cannot be read or written now; the next call tries again.
            WeightsMissingError: nor can the target's, or there is no student any more.
        """
        self._follow_stable()
        self._follow_candidate()
        if self._trial is not None and self._decide(self._trial):
            self._follow_stable()
            self._follow_candidate()
        self._metrics.trial(is_running=self._trial is not None)

    def _follow_stable(self) -> None:
        path = self._shelf.in_use()
        stamp = stamp_of(path)
        if stamp == self._stable_stamp:
            return
        if self._candidate is not None and stamp == self._candidate_stamp:
            successor = self._candidate
        else:
            try:
                successor = self._build(path)
            except WeightsMismatchError:
                logger.exception("the drafter at work stays: %s cannot be loaded", path)
                self._stable_stamp = stamp
                return
        self._stable, self._stable_stamp = successor, stamp
        # A trial that goes on is one against the new drafter.
        self._candidate = self._candidate_stamp = self._trial = None
        self._server.replace_drafter(successor)
        logger.info("drafting with %s", path)

    def _follow_candidate(self) -> None:
        stamp = stamp_of(self._shelf.candidate)
        if stamp == self._candidate_stamp:
            return
        if self._trial is not None:
            self._server.replace_drafter(self._stable)
            logger.info("the trial is over; the drafter at work stays")
        self._candidate = self._candidate_stamp = self._trial = None
        if stamp is not None:
            self._try(stamp)
            self._candidate_stamp = stamp

    def _try(self, stamp: FileStamp) -> None:
        if stamp != self._begun_stamp:
            if (num_begun := self._shelf.begin()) > _MAX_BEGUN:
                self._end(stamp, Outcome.ROLLED_BACK, f"begun {num_begun - 1} times, never ended")
                return
            self._begun_stamp = stamp
        try:
            self._candidate = self._build(self._shelf.candidate)
        except (OSError, WeightsMissingError):
            # This says nothing of the candidate, which other replicas may be able to read.
            raise
        except Exception as error:
            # Memory may not suffice for two drafters, and a file may hold anything.
            logger.exception("the candidate cannot be loaded")
            reason = f"it cannot be loaded: {str(error) or type(error).__name__}"
            self._end(stamp, Outcome.ROLLED_BACK, reason)
            return
        self._trial = CanaryDrafter(
            self._stable,
            self._candidate,
            share=self._rule.share,
            vocab_size=self._server.vocab_size,
        )
        self._server.replace_drafter(self._trial)
        logger.info("a candidate drafts for %.0f %% of the sessions", 100 * self._rule.share)

    def _decide(self, trial: CanaryDrafter) -> bool:
        tallies = trial.tallies
        outcome, reason = judge(
            tallies[DrafterRole.STABLE], tallies[DrafterRole.CANDIDATE], self._rule
        )
        if trial.failure is not None:
            outcome, reason = Outcome.ROLLED_BACK, f"it failed: {trial.failure}"
        logger.debug("the candidate: %s", reason)
        if outcome is Outcome.UNDECIDED or self._candidate_stamp is None:
            return False
        return self._end(self._candidate_stamp, outcome, reason)

    def _end(self, candidate: FileStamp, outcome: Outcome, reason: str) -> bool:
        decision = Decision(outcome=outcome, reason=reason, decided_at=time.time())
        end = self._shelf.promote if outcome is Outcome.PROMOTED else self._shelf.reject
        if not end(candidate, decision):
            return False
        logger.warning("the candidate is %s: %s", outcome.replace("_", " "), reason)
        self._metrics.decided(outcome)
        return True
