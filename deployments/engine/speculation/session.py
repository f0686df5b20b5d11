"""A session as its target sees it: what the drafter has been sent, asked and has answered.

    waiting --open--> live --dropped / link lost--> waiting --...--> closed with the link's session

Nothing that gets lost needs to be noticed here. A lost commit makes the next one a gap, which the
drafter answers with Resync; a lost open makes the next commit unknown, which it answers with
Dropped; lost answers come again with the next round's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.speculation import wire
from deployments.engine.speculation.errors import MalformedMessageError
from deployments.engine.speculation.outcome_table import Continuation, OutcomeTable, TableShelf
from protos import draft_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import Ask, DraftTree, SessionSpec

_MAX_ASKED_ROUNDS = 4
_MAX_HOLD_ROUNDS = 64
_LONGEST_S = 60.0
"""A round that takes longer has all the time there is."""


class TableReceipt(NamedTuple):
    """A table that was of use.

    Attributes:
        round_trip_s: from its commit to its arrival.
        is_late: a newer round had already begun.
    """

    round_trip_s: float
    is_late: bool


@dataclass(frozen=True, slots=True)
class _AskedRound:
    base_len: int
    in_flight: DraftTree
    sent_at: float


class PoolSession:
    """One speculated sequence on one link at a time; not thread-safe.

    Attributes:
        epoch: of the newest open; 0 before the first.
        is_live: the drafter is taken to hold the session.
        given_up: the drafter will never hold it (the text is too long).
        has_asked: a table was asked for when the round began.
        is_silent: the drafter's newest table holds no row.
        num_sent: tokens of the text sent in this epoch.
    """

    def __init__(self, spec: SessionSpec, vocab_size: int) -> None:
        self.spec = spec
        self.epoch = 0
        self.is_live = False
        self.given_up = False
        self.has_asked = False
        self.is_silent = False
        self.num_sent = 0
        self._vocab_size = vocab_size
        self._round = 0
        self._resent_round = 0
        self._asked: dict[int, _AskedRound] = {}
        self._tables = TableShelf()
        self._num_drops = 0
        self._hold_rounds = 0

    @property
    def may_open(self) -> bool:
        """Whether the session is waiting to be opened and nothing speaks against it."""
        return not (self.is_live or self.given_up or self._hold_rounds)

    def pass_round(self) -> None:
        """A round went by in which the session was not live."""
        self._hold_rounds = max(0, self._hold_rounds - 1)

    def open(self, token_ids: Sequence[int], room: int) -> draft_pb2.Open:
        """Begin a new epoch with at most ``room`` tokens of the text."""
        self.epoch += 1
        self.is_live = True
        self._round = 0
        self._resent_round = 0
        self._asked.clear()
        self.num_sent = min(room, len(token_ids))
        return wire.open_to_wire(self.spec, self.epoch, token_ids[: self.num_sent])

    def commit(
        self, token_ids: Sequence[int], in_flight: DraftTree, ask: Ask, room: int, now: float
    ) -> draft_pb2.Commit:
        """Announce a round, or, while text is still to be sent, at most ``room`` tokens of it."""
        committed = token_ids[self.num_sent : self.num_sent + room]
        self.num_sent += len(committed)
        self._round += 1
        message = draft_pb2.Commit(
            session=self.spec.session_id,
            epoch=self.epoch,
            round=self._round,
            base_len=self.num_sent,
            committed=committed,
        )
        self.has_asked = self.num_sent == len(token_ids) and ask.fanout > 0
        if self.has_asked:
            message.in_flight_token_ids.extend(in_flight.token_ids)
            message.in_flight_parents.extend(parent + 1 for parent in in_flight.parents)
            message.num_draft_tokens = ask.num_draft_tokens
            message.fanout = ask.fanout
            if ask.within_s < _LONGEST_S:
                message.within_us = max(1, int(1e6 * ask.within_s))
            self._asked[self._round] = _AskedRound(self.num_sent, in_flight, now)
            if len(self._asked) > _MAX_ASKED_ROUNDS:
                del self._asked[min(self._asked)]
        return message

    def close(self) -> draft_pb2.Close:
        """Leave the drafter; the session may be opened again, there or elsewhere."""
        self.suspend()
        return draft_pb2.Close(session=self.spec.session_id, epoch=self.epoch)

    def suspend(self) -> None:
        """The stream is gone. Tables stay: they are tied to the text, not to the stream."""
        self.is_live = False
        self.has_asked = False
        self.is_silent = False
        self._asked.clear()

    def moved(self) -> None:
        """The session goes to another drafter, which knows nothing of old quarrels."""
        self.suspend()
        self.given_up = False
        self._num_drops = 0
        self._hold_rounds = 0

    def on_table(self, table: draft_pb2.Table, received_at: float) -> TableReceipt | None:
        """Keep a table.

        Returns:
            None if it is stale: another epoch, a round answered before or long ago.

        Raises:
            MalformedMessageError: it does not answer the round it names.
        """
        if not self.is_live or table.epoch != self.epoch or table.round not in self._asked:
            return None
        asked = self._asked[table.round]
        if table.base_len != asked.base_len:
            raise MalformedMessageError("a table with another base than its round")
        rows = wire.rows_from_wire(table.rows, asked.in_flight, self._vocab_size)
        del self._asked[table.round]
        self.is_silent = not rows
        self._tables.put(OutcomeTable.build(asked.base_len, asked.in_flight, rows))
        self._num_drops = 0
        return TableReceipt(received_at - asked.sent_at, table.round < self._round)

    def on_resync(self, resync: draft_pb2.Resync) -> bool:
        """Send again from where the drafter's text ends.

        Returns:
            Whether the message was news: a gap is reported once per commit that meets it, and only
            a report about a commit sent after the last repair says anything.

        Raises:
            MalformedMessageError: the drafter claims text it was never sent.
        """
        if not self.is_live or resync.epoch != self.epoch or resync.round <= self._resent_round:
            return False
        if not 0 < resync.have_len <= self.num_sent or resync.round > self._round:
            raise MalformedMessageError("a resync beyond what was sent")
        self.num_sent = resync.have_len
        self._resent_round = self._round
        return True

    def on_dropped(self, dropped: draft_pb2.Dropped) -> bool:
        """The drafter let go of the session; open it anew some rounds later.

        Returns:
            Whether the message was news.
        """
        if not self.is_live or dropped.epoch != self.epoch:
            return False
        if dropped.reason == draft_pb2.Dropped.TOO_LONG:
            self.given_up = True
        self.quarantine()
        return True

    def quarantine(self) -> None:
        """Stop asking for a while, doubling with every time that no table came in between."""
        self.suspend()
        self._hold_rounds = min(2**self._num_drops, _MAX_HOLD_ROUNDS)
        self._num_drops = min(self._num_drops + 1, _MAX_HOLD_ROUNDS.bit_length())

    def draft_after(self, token_ids: Sequence[int]) -> Continuation:
        """What the pool proposes behind the committed text; empty if no row fits."""
        return self._tables.draft_after(token_ids)
