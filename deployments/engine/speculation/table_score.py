"""How good a session's tables were, by the text that its target wrote afterwards.

The text is the target's alone, so what a table was worth can be told without asking: the text says
which outcome came true, and how far the draft behind it was right, whether the target used it or
not. A table that was not there when the next round began is worth nothing.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import DraftTree, OutcomeRow


class _Told(NamedTuple):
    base_len: int
    in_flight: DraftTree
    rows: Sequence[OutcomeRow]
    at: float


class TableScore:
    """Of one session and one drafter; not thread-safe.

    Attributes:
        num_rounds: tables asked for whose worth is known.
        num_confirmed: draft tokens that were in time and right.
    """

    __slots__ = ("_told", "num_confirmed", "num_rounds")

    def __init__(self) -> None:
        self.num_rounds = 0
        self.num_confirmed = 0
        # Every round adds a token, so a table waits for as many rounds as it has levels at most.
        self._told: deque[_Told] = deque()

    def missed(self) -> None:
        """A table was asked for, and the next round began before it was made."""
        self.num_rounds += 1

    def told(
        self, base_len: int, in_flight: DraftTree, rows: Sequence[OutcomeRow], at: float
    ) -> None:
        """A table was made.

        Args:
            base_len: length of the text behind which it foretells.
            in_flight: the draft under verification.
            rows: of the table.
            at: seconds.
        """
        self._told.append(_Told(base_len, in_flight, rows, at))

    def grew(self, token_ids: Sequence[int], at: float) -> None:
        """The session's text is longer now.

        Args:
            token_ids: all of it.
            at: when the news of it arrived, in seconds.
        """
        if self._told and at < (last := self._told[-1]).at and len(token_ids) > last.base_len:
            self._told[-1] = last._replace(rows=())
        while self._told:
            confirmed = _confirmed(self._told[0], token_ids)
            if confirmed is None:
                return
            self._told.popleft()
            self.num_rounds += 1
            self.num_confirmed += confirmed


def _confirmed(told: _Told, token_ids: Sequence[int]) -> int | None:
    """Draft tokens that were right; None while the text does not tell."""
    longest = max((len(row.draft_token_ids) for row in told.rows), default=0)
    end = told.base_len + len(told.in_flight) + 1 + longest
    behind = token_ids[told.base_len : end]
    accepted = told.in_flight.walk(behind)
    if len(behind) <= len(accepted):
        return None
    node = accepted[-1] if accepted else -1
    bonus, follows = behind[len(accepted)], behind[len(accepted) + 1 :]
    for row in told.rows:
        if row.node == node and row.bonus_token_id == bonus:
            draft = row.draft_token_ids
            right = 0
            while right < min(len(draft), len(follows)) and draft[right] == follows[right]:
                right += 1
            return None if right == len(follows) < len(draft) else right
    return 0
