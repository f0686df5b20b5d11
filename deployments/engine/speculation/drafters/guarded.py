"""A drafter that may fail: what it raises is counted, and too much of it switches it off."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deployments.engine.speculation.drafters.ask import ask, calling
from deployments.engine.speculation.errors import DrafterFailedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.speculation.types import DraftQuery, OutcomeRow, SessionSpec

logger = logging.getLogger(__name__)


class GuardedDrafter:
    """Hands on to a drafter as long as it works; without one it has nothing to say.

    Args:
        vocab_size: ids outside it are never handed on.
        patience: a method that fails so often in a row switches the drafter off.

    Attributes:
        drafter: None where there is none, or it was switched off.
        failure: what it was switched off for.
        num_failures: calls that raised, or were answered with bad rows.
    """

    def __init__(self, drafter: Drafter | None, vocab_size: int, *, patience: int = 3) -> None:
        self.drafter = drafter
        self.failure: str | None = None
        self.num_failures = 0
        self._vocab_size = vocab_size
        self._patience = patience
        self._num_in_a_row: Counter[str] = Counter()

    def open(self, session: SessionSpec) -> None:
        """As ``Drafter.open``."""
        if self.drafter is not None:
            with self._tolerating(self.drafter, "open"):
                self.drafter.open(session)

    def append(self, session_id: int, token_ids: Sequence[int]) -> None:
        """As ``Drafter.append``."""
        if self.drafter is not None:
            with self._tolerating(self.drafter, "append"):
                self.drafter.append(session_id, token_ids)

    def close(self, session_id: int) -> None:
        """As ``Drafter.close``."""
        if self.drafter is not None:
            with self._tolerating(self.drafter, "close"):
                self.drafter.close(session_id)

    def ask(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """As ``Drafter.propose``, checked and cut to what was asked."""
        answers: list[list[OutcomeRow]] = [[] for _ in queries]
        if self.drafter is not None and queries:
            with self._tolerating(self.drafter, "propose"):
                answers, num_bad_rows = ask(self.drafter, queries, self._vocab_size)
                if num_bad_rows:
                    # The others serve all the same.
                    raise DrafterFailedError(f"{num_bad_rows} rows answer nothing")
        return answers

    @contextmanager
    def _tolerating(self, drafter: Drafter, method: str) -> Iterator[None]:
        try:
            with calling(drafter):
                yield
        except DrafterFailedError as error:
            self.num_failures += 1
            self._num_in_a_row[method] += 1
            name = type(drafter).__name__
            logger.warning("%s failed to %s", name, method, exc_info=True)
            if self._num_in_a_row[method] >= self._patience:
                logger.error("%s is switched off", name)  # noqa: TRY400
                self.failure = str(error)
                self.drafter = None
        else:
            self._num_in_a_row[method] = 0
