"""A drafter inside the target: what it raises is counted, and too much of it switches it off."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deployments.engine.speculation.drafters.ask import ask, calling
from deployments.engine.speculation.errors import DrafterFailedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.speculation.types import DraftQuery, OutcomeRow, SessionSpec

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3


class GuardedDrafter:
    """Hands on to a drafter as long as it works; without one it has nothing to say.

    Attributes:
        drafter: None where there is none, or it was switched off.
        num_failures: calls that raised, or answers that do not fit.
    """

    def __init__(self, drafter: Drafter | None, vocab_size: int) -> None:
        self.drafter = drafter
        self.num_failures = 0
        self._vocab_size = vocab_size

    def open(self, session: SessionSpec) -> None:
        """As ``Drafter.open``."""
        if self.drafter is not None:
            with self._tolerating(self.drafter):
                self.drafter.open(session)

    def append(self, session_id: int, token_ids: Sequence[int]) -> None:
        """As ``Drafter.append``."""
        if self.drafter is not None:
            with self._tolerating(self.drafter):
                self.drafter.append(session_id, token_ids)

    def close(self, session_id: int) -> None:
        """As ``Drafter.close``."""
        if self.drafter is not None:
            with self._tolerating(self.drafter):
                self.drafter.close(session_id)

    def ask(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """As ``Drafter.propose``, checked and cut to what was asked."""
        answers: list[list[OutcomeRow]] = [[] for _ in queries]
        if self.drafter is not None and queries:
            with self._tolerating(self.drafter):
                answers = ask(self.drafter, queries, self._vocab_size)
        return answers

    @contextmanager
    def _tolerating(self, drafter: Drafter) -> Iterator[None]:
        try:
            with calling(drafter):
                yield
        except DrafterFailedError:
            self.num_failures += 1
            name = type(drafter).__name__
            logger.warning("%s failed in the target", name, exc_info=True)
            if self.num_failures >= _MAX_FAILURES:
                logger.error("%s failed repeatedly and is switched off", name)  # noqa: TRY400
                self.drafter = None
