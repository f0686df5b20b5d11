"""Two drafters at once: a share of the sessions is drafted by a candidate, to see how it does."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.engine.speculation.canary import DrafterRole, Tally
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.drafters.guarded import GuardedDrafter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.table_score import TableScore
    from deployments.engine.speculation.types import DraftQuery, OutcomeRow, SessionSpec


class CanaryDrafter(Drafter):
    """Routes each session to one of two drafters, by a hash of its request's id.

    A candidate that fails once is asked no more: its sessions go on with the other drafter, in the
    same step.

    Args:
        share: of the sessions that the candidate drafts for, 0 to 1.
        vocab_size: a candidate's ids outside it count as a failure.

    Attributes:
        tallies: of the sessions that ended; may be read from any thread.
    """

    def __init__(
        self, stable: Drafter, candidate: Drafter, *, share: float, vocab_size: int
    ) -> None:
        self.tallies = dict.fromkeys(DrafterRole, Tally())
        self._stable = stable
        self._candidate = GuardedDrafter(candidate, vocab_size, patience=1)
        self._share = share
        self._drawn: dict[int, SessionSpec] = {}

    @property
    def failure(self) -> str | None:
        """What the candidate did wrong, once it has."""
        return self._candidate.failure

    def learn(self, session_id: int, score: TableScore) -> DrafterRole:
        """A session is about to close.

        Args:
            session_id: of the session.
            score: of its tables, since it was opened here.

        Returns:
            Which of the two drafted for it.
        """
        role = DrafterRole.CANDIDATE if session_id in self._drawn else DrafterRole.STABLE
        self.tallies[role] = self.tallies[role].plus(score.num_rounds, score.num_confirmed)
        return role

    def open(self, session: SessionSpec) -> None:
        """A session begins, with one of the two."""
        if self.failure is None and draw(session.request_id) < self._share:
            self._candidate.open(session)
            if self.failure is None:
                self._drawn[session.session_id] = session
                # It may have drafted for the session before the trial.
                self._stable.close(session.session_id)
                return
        self._stable.open(session)

    def append(self, session_id: int, token_ids: Sequence[int]) -> None:
        """For drafters that learn from output."""
        self._drafter_of(session_id).append(session_id, token_ids)

    def close(self, session_id: int) -> None:
        """A session ended or was evicted; unknown ids are ignored."""
        self._drafter_of(session_id).close(session_id)
        self._drawn.pop(session_id, None)

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """Rows of either drafter, in the order of the queries."""
        answers: dict[int, list[OutcomeRow]] = {}
        drawn = [query for query in queries if query.session_id in self._drawn]
        rows = self._candidate.ask(drawn)
        if self.failure is None:
            answers = dict(zip((query.session_id for query in drawn), rows, strict=True))
        else:
            for query in drawn:
                spec = self._drawn.pop(query.session_id)
                self._stable.open(replace(spec, token_ids=tuple(query.token_ids)))
        others = [query for query in queries if query.session_id not in answers]
        if others:
            rows = self._stable.propose(others)
            answers |= dict(zip((query.session_id for query in others), rows, strict=True))
        return [answers[query.session_id] for query in queries]

    def _drafter_of(self, session_id: int) -> Drafter | GuardedDrafter:
        return self._candidate if session_id in self._drawn else self._stable


def draw(request_id: str) -> float:
    """A number in [0, 1) that is a request's own on every replica."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
