"""A drafter that is right as often as it is told to be, and takes the time it is told to take."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from deployments.engine.simulated_engine.text import chance, effective_seed, last_or_zero
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.types import OutcomeRow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.engine.config import SimulatedConfig
    from deployments.engine.simulated_engine.text import SimulatedText
    from deployments.engine.speculation.types import DraftQuery, DraftSampling


class SimulatedDrafter(Drafter):
    """Guesses of a simulated draft model for a simulated target.

    Whether a guess is right is drawn for each place of a text: with the configured chance the first
    guess is; each further one of the same place is right with that chance if those before it were
    wrong.

    Args:
        config: chance and times.
        text: what the target writes.
        sleep: lets a batch's time pass.
    """

    def __init__(
        self,
        config: SimulatedConfig,
        text: SimulatedText,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._text = text
        self._sleep = sleep

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """See ``Drafter``."""
        answers = [self._rows(query) for query in queries]
        num_rows = sum(map(len, answers))
        self._sleep(self._config.draft_batch_s + num_rows * self._config.draft_row_s)
        return answers

    def _rows(self, query: DraftQuery) -> list[OutcomeRow]:
        rows: list[OutcomeRow] = []
        for node in range(-1, len(query.in_flight)):
            path = query.in_flight.path_to(node)
            position = len(query.token_ids) + len(path)
            last = query.in_flight.token_ids[node] if path else last_or_zero(query.token_ids)
            for rank in range(query.fanout):
                bonus = self._guess(query.sampling, position, last, rank)
                drafted = self._chain(query, position + 1, bonus)
                rows.append(OutcomeRow(node, bonus, drafted))
        return rows

    def _chain(self, query: DraftQuery, position: int, last: int) -> tuple[int, ...]:
        chain: list[int] = []
        for offset in range(query.num_draft_tokens):
            last = self._guess(query.sampling, position + offset, last, 0)
            chain.append(last)
        return tuple(chain)

    def _guess(self, sampling: DraftSampling, position: int, last: int, rank: int) -> int:
        seed = effective_seed(sampling.seed, sampling.temperature)
        token = self._text.next_token(seed, sampling.choice_index, position, last)
        drawn = chance(seed, sampling.choice_index, position, last)
        wrong = 1 - self._config.draft_acceptance
        # Of the unit interval, rank r owns what the ranks before it left, times the chance.
        if 1 - wrong**rank <= drawn < 1 - wrong ** (rank + 1):
            return token
        for _ in range(rank + 1):
            token = self._text.other_token(token)
        return token
