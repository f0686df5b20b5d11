"""A session as its drafter sees it: the text so far and the newest question about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.engine.speculation import wire
from deployments.engine.speculation.errors import MalformedMessageError
from deployments.engine.speculation.table_score import TableScore
from deployments.engine.speculation.types import DraftQuery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.trace import Span

    from deployments.engine.speculation.types import OutcomeRow, SessionSpec
    from protos import draft_pb2

tracer = trace.get_tracer(__name__)
_PROPAGATOR = TraceContextTextMapPropagator()


class CommitOutcome(Enum):
    """What a commit was."""

    APPLIED = auto()
    STALE = auto()
    GAP = auto()


@dataclass(frozen=True, slots=True)
class Question:
    """A table to make: for which round, and what the drafter is asked."""

    round: int
    base_len: int
    query: DraftQuery


class DraftSession:
    """The text is always a prefix of the target's committed text; not thread-safe.

    Attributes:
        spec: with the id the session goes by at the drafter.
        epoch: of the target's open.
        used_at: seconds; when the target last spoke of it.
        question: not answered yet; a newer round replaces it.
        score: of its tables, since its drafter is at work.
    """

    def __init__(self, spec: SessionSpec, epoch: int, now: float) -> None:
        self.spec = spec
        self.epoch = epoch
        self.used_at = now
        self.question: Question | None = None
        self.token_ids = list(spec.token_ids)
        self.score = TableScore()
        self._round = 0
        self._num_rounds = 0
        self._num_tables = 0
        self._num_rows = 0
        self._span = _start_span(spec.traceparent)

    def on_table(self, question: Question, rows: Sequence[OutcomeRow], now: float) -> None:
        """Count a table made for the target."""
        self._num_tables += 1
        self._num_rows += len(rows)
        # The next round, which asked for nothing, may have begun before this table was made.
        is_late = len(self.token_ids) > question.base_len
        self.score.told(question.base_len, question.query.in_flight, () if is_late else rows, now)

    def end(self, reason: str) -> None:
        """End the session's span.

        Args:
            reason: why the session is forgotten.
        """
        self._span.set_attributes(
            {
                "paceline.rounds": self._num_rounds,
                "paceline.tables": self._num_tables,
                "paceline.rows": self._num_rows,
                "paceline.session_end": reason,
            }
        )
        self._span.end()

    def commit(
        self, message: draft_pb2.Commit, vocab_size: int, now: float, arrived_at: float
    ) -> CommitOutcome:
        """Append what is new and remember the question.

        Args:
            message: from the target.
            vocab_size: ids outside it are malformed.
            now: seconds.
            arrived_at: when the message came off the wire.

        Raises:
            MalformedMessageError: the message contradicts itself or the text so far.
        """
        self.used_at = now
        if message.round <= self._round:
            return CommitOutcome.STALE
        have_len = len(self.token_ids)
        start = message.base_len - len(message.committed)
        if start > have_len:
            return CommitOutcome.GAP
        if start < 0 or message.base_len < have_len:
            raise MalformedMessageError("a commit shorter than the text before it")
        wire.check_token_ids(message.committed, vocab_size)
        in_flight = wire.in_flight_from_wire(message, vocab_size)
        overlap = have_len - start
        if list(message.committed[:overlap]) != self.token_ids[start:]:
            raise MalformedMessageError("a commit that rewrites text")
        self.token_ids.extend(message.committed[overlap:])
        self._round = message.round
        self._num_rounds += 1
        self.score.grew(self.token_ids, arrived_at)
        if message.fanout:
            if self.question is not None:
                self.score.missed()
            query = DraftQuery(
                session_id=self.spec.session_id,
                token_ids=self.token_ids,
                in_flight=in_flight,
                num_draft_tokens=message.num_draft_tokens,
                fanout=message.fanout,
                sampling=self.spec.sampling,
                answer_by=arrived_at + 1e-6 * message.within_us if message.within_us else math.inf,
            )
            self.question = Question(message.round, message.base_len, query)
        return CommitOutcome.APPLIED


def _start_span(traceparent: str | None) -> Span:
    context = _PROPAGATOR.extract({"traceparent": traceparent or ""})
    # Without a parent it would be the root of a trace of its own, which nobody asked for.
    if not trace.get_current_span(context).get_span_context().is_valid:
        return trace.INVALID_SPAN
    return tracer.start_span("draft.session", context)
