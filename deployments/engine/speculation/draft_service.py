"""The drafter's side of all its streams: sessions in, batches to the drafter, tables out.

One thread calls ``step``. What a target gets wrong costs that session; what a drafter gets wrong
costs the sessions of that batch; neither ends a stream or the thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.speculation import wire
from deployments.engine.speculation.canary import DrafterRole
from deployments.engine.speculation.draft_session import CommitOutcome, DraftSession, Question
from deployments.engine.speculation.draft_stats import DraftServerStats
from deployments.engine.speculation.drafters.ask import ask, calling
from deployments.engine.speculation.drafters.canary import CanaryDrafter
from deployments.engine.speculation.errors import DrafterFailedError, MalformedMessageError
from deployments.engine.speculation.fair_batch import FairBatches, Waiting
from deployments.engine.speculation.table_score import TableScore
from deployments.engine.speculation.transport import TransportState
from protos import draft_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.speculation.transport import DraftTransport

logger = logging.getLogger(__name__)

_SMOOTHING = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftLimits:
    """Bounds of a draft replica.

    Attributes:
        max_sessions: beyond it a session is evicted: of the tenant with the most sessions the one
            unused for longest.
        max_session_tokens: text of one session.
        max_batch_sessions: sessions of one drafter call.
        idle_timeout_s: a session its target does not speak of expires.
    """

    max_sessions: int = 256
    max_session_tokens: int = 32_768
    max_batch_sessions: int = 16
    idle_timeout_s: float = 120.0


class _Key(NamedTuple):
    stream: int
    session: int


class _Asked(NamedTuple):
    key: _Key
    session: DraftSession
    question: Question


@dataclass(slots=True)
class _Stream:
    transport: DraftTransport
    reply: draft_pb2.DraftFrame


class DraftService:
    """Sessions of any number of streams on one drafter.

    ``accept``, ``replace_drafter`` and ``stats`` may be called from any thread; ``step`` belongs to
    one.
    """

    def __init__(
        self,
        drafter: Drafter,
        *,
        vocab_size: int,
        limits: DraftLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._drafter = drafter
        self._vocab_size = vocab_size
        self._limits = limits or DraftLimits()
        self._clock = clock
        self._lock = threading.Lock()
        self._arrivals: list[DraftTransport] = []
        self._successor: Drafter | None = None
        self._streams: dict[int, _Stream] = {}
        self._sessions: OrderedDict[_Key, DraftSession] = OrderedDict()
        self._pending: OrderedDict[_Key, None] = OrderedDict()
        self._batches: FairBatches[_Key] = FairBatches(self._limits.max_batch_sessions)
        self._num_opened = 0
        self._num_accepted_streams = 0
        self._stats = DraftServerStats()
        self._snapshot = self._stats.snapshot()

    @property
    def limits(self) -> DraftLimits:
        """The bounds of this replica."""
        return self._limits

    def accept(self, transport: DraftTransport) -> None:
        """Serve a stream whose handshake is done."""
        with self._lock:
            self._arrivals.append(transport)

    def replace_drafter(self, successor: Drafter) -> None:
        """Draft with another one from the next step on; sessions and streams stay."""
        with self._lock:
            self._successor = successor

    def stats(self) -> DraftServerStats:
        """As of the end of the last step."""
        return self._snapshot

    def step(self) -> bool:
        """Take in what arrived, answer one batch of questions.

        Returns:
            Whether questions are left over.
        """
        now = self._clock()
        self._reap_streams()
        self._hand_over()
        for number, stream in self._streams.items():
            for frame, arrived_at in stream.transport.receive():
                self._apply(number, frame, now, arrived_at)
        self._expire(now)
        # Repairs do not wait for the batch.
        self._flush()
        self._draft_batch()
        self._flush()
        self._publish()
        return bool(self._pending)

    def close(self) -> None:
        """End all streams and let the drafter forget their sessions."""
        with self._lock:
            transports = self._arrivals + [item.transport for item in self._streams.values()]
            self._arrivals = []
        for transport in transports:
            transport.close()
        self._reap_streams()
        self._publish()

    def _reap_streams(self) -> None:
        with self._lock:
            arrivals, self._arrivals = self._arrivals, []
        for transport in arrivals:
            self._num_accepted_streams += 1
            self._streams[self._num_accepted_streams] = _Stream(transport, draft_pb2.DraftFrame())
        ended = {
            number
            for number, stream in self._streams.items()
            if stream.transport.state is TransportState.CLOSED
        }
        for key in [key for key in self._sessions if key.stream in ended]:
            self._forget(key, "stream_ended")
        for number in ended:
            self._stats.num_frames_dropped += self._streams.pop(number).transport.num_dropped

    def _hand_over(self) -> None:
        with self._lock:
            successor, self._successor = self._successor, None
        if successor is None:
            return
        # The old one goes with all it knows of its sessions, and with its score.
        self._drafter = successor
        for key, session in list(self._sessions.items()):
            session.score = TableScore()
            try:
                with calling(successor):
                    successor.open(replace(session.spec, token_ids=tuple(session.token_ids)))
            except DrafterFailedError:
                self._stats.num_drafter_failures += 1
                logger.warning("the new drafter failed to open a session", exc_info=True)
                self._drop(key, session.epoch, draft_pb2.Dropped.DRAFTER_FAILED)

    def _apply(
        self, number: int, frame: draft_pb2.TargetFrame, now: float, arrived_at: float
    ) -> None:
        for closing in frame.closes:
            key = _Key(number, closing.session)
            session = self._sessions.get(key)
            if session is not None and session.epoch <= closing.epoch:
                self._forget(key, "closed")
        for opening in frame.opens:
            self._open(_Key(number, opening.session), opening, now)
        for commit in frame.commits:
            self._commit(_Key(number, commit.session), commit, now, arrived_at)

    def _open(self, key: _Key, message: draft_pb2.Open, now: float) -> None:
        old = self._sessions.get(key)
        if old is not None:
            if message.epoch <= old.epoch:
                return
            self._forget(key, "reopened")
        if len(message.token_ids) > self._limits.max_session_tokens:
            self._drop(key, message.epoch, draft_pb2.Dropped.TOO_LONG)
            return
        self._num_opened += 1
        try:
            spec = wire.open_from_wire(message, self._num_opened, self._vocab_size)
            with calling(self._drafter):
                self._drafter.open(spec)
        except MalformedMessageError as error:
            logger.warning("a target's open is malformed: %s", error)
            self._drop(key, message.epoch, draft_pb2.Dropped.MALFORMED)
            return
        except DrafterFailedError:
            self._stats.num_drafter_failures += 1
            logger.warning("the drafter failed to open a session", exc_info=True)
            self._drop(key, message.epoch, draft_pb2.Dropped.DRAFTER_FAILED)
            return
        self._sessions[key] = DraftSession(spec, message.epoch, now)
        if len(self._sessions) > self._limits.max_sessions:
            self._evict()

    def _evict(self) -> None:
        """Drop the session unused for longest, of the tenant with the most sessions."""
        num_by_tenant = Counter(session.spec.tenant for session in self._sessions.values())
        most = max(num_by_tenant.values())
        for key, session in self._sessions.items():
            if num_by_tenant[session.spec.tenant] == most:
                self._drop(key, session.epoch, draft_pb2.Dropped.EVICTED)
                return

    def _commit(self, key: _Key, message: draft_pb2.Commit, now: float, arrived_at: float) -> None:
        session = self._sessions.get(key)
        if session is None or message.epoch > session.epoch:
            self._drop(key, message.epoch, draft_pb2.Dropped.UNKNOWN)
            return
        if message.epoch < session.epoch:
            self._stats.num_stale_commits += 1
            return
        if message.base_len > self._limits.max_session_tokens:
            self._drop(key, message.epoch, draft_pb2.Dropped.TOO_LONG)
            return
        asked_before = session.question
        try:
            outcome = session.commit(message, self._vocab_size, now, arrived_at)
        except MalformedMessageError as error:
            logger.warning("a target's commit is malformed: %s", error)
            self._drop(key, message.epoch, draft_pb2.Dropped.MALFORMED)
            return
        self._sessions.move_to_end(key)
        if outcome is CommitOutcome.STALE:
            self._stats.num_stale_commits += 1
        elif outcome is CommitOutcome.GAP:
            self._stats.num_resyncs += 1
            self._streams[key.stream].reply.resyncs.add(
                session=key.session,
                epoch=session.epoch,
                round=message.round,
                have_len=len(session.token_ids),
            )
        elif session.question is not asked_before:
            self._stats.num_superseded += asked_before is not None
            self._pending[key] = None

    def _expire(self, now: float) -> None:
        # In order of last use, so the first that is young enough ends the search.
        while self._sessions:
            key, session = next(iter(self._sessions.items()))
            if now - session.used_at < self._limits.idle_timeout_s:
                return
            self._drop(key, session.epoch, draft_pb2.Dropped.EXPIRED)

    def _draft_batch(self) -> None:
        pending = [
            _Asked(key, session, session.question)
            for key, session in ((key, self._sessions[key]) for key in self._pending)
            if session.question is not None
        ]
        granted = self._batches.choose(
            {item.key: Waiting(item.session.spec.tenant, item.question.query) for item in pending}
        )
        asked = [self._take(item, granted[item.key]) for item in pending if item.key in granted]
        if not asked:
            return
        started = time.monotonic()
        try:
            queries = [item.question.query for item in asked]
            answers = ask(self._drafter, queries, self._vocab_size)
        except DrafterFailedError:
            logger.warning("the drafter failed; its batch is dropped", exc_info=True)
            self._stats.num_drafter_failures += 1
            for item in asked:
                self._drop(item.key, item.session.epoch, draft_pb2.Dropped.DRAFTER_FAILED)
            return
        self._on_batch_time(time.monotonic() - started)
        if answers.num_bad_rows:
            self._stats.num_bad_rows += answers.num_bad_rows
            logger.warning("the drafter made %d rows that answer nothing", answers.num_bad_rows)
        for (key, session, question), rows in zip(asked, answers.rows, strict=True):
            self._stats.num_tables += 1
            self._stats.num_rows += len(rows)
            session.on_table(question, rows, self._clock())
            self._streams[key.stream].reply.tables.add(
                session=key.session,
                epoch=session.epoch,
                round=question.round,
                base_len=question.base_len,
                rows=wire.rows_to_wire(rows),
            )

    def _take(self, item: _Asked, fanout: int) -> _Asked:
        """The question as the drafter gets it; it waits no more."""
        key, session, question = item
        del self._pending[key]
        session.question = None
        query = replace(question.query, fanout=fanout)
        if question.base_len < len(session.token_ids):
            # The text grew behind the question, by a chunk that asked nothing.
            query = replace(query, token_ids=session.token_ids[: question.base_len])
        return _Asked(key, session, replace(question, query=query))

    def _on_batch_time(self, seconds: float) -> None:
        old = self._stats.batch_time_ewma_s
        self._stats.batch_time_ewma_s = old + _SMOOTHING * (seconds - old) if old else seconds
        self._stats.num_batches += 1

    def _flush(self) -> None:
        for stream in self._streams.values():
            if not (stream.reply.tables or stream.reply.resyncs or stream.reply.drops):
                continue
            stream.reply.load.num_pending = len(self._pending)
            stream.reply.load.num_sessions = len(self._sessions)
            stream.reply.load.batch_us = int(self._stats.batch_time_ewma_s * 1e6)
            stream.transport.send(stream.reply)
            stream.reply = draft_pb2.DraftFrame()

    def _drop(self, key: _Key, epoch: int, reason: draft_pb2.Dropped.Reason.ValueType) -> None:
        name = draft_pb2.Dropped.Reason.Name(reason).lower()
        self._forget(key, name)
        self._stats.num_dropped_by_reason[name] += 1
        self._streams[key.stream].reply.drops.add(session=key.session, epoch=epoch, reason=reason)

    def _forget(self, key: _Key, reason: str) -> None:
        session = self._sessions.pop(key, None)
        self._pending.pop(key, None)
        if session is None:
            return
        session.end(reason)
        self._learn_score(session)
        try:
            with calling(self._drafter):
                self._drafter.close(session.spec.session_id)
        except DrafterFailedError:
            self._stats.num_drafter_failures += 1
            logger.warning("the drafter failed to close a session", exc_info=True)

    def _learn_score(self, session: DraftSession) -> None:
        drafter, score = self._drafter, session.score
        role = DrafterRole.STABLE
        if isinstance(drafter, CanaryDrafter):
            role = drafter.learn(session.spec.session_id, score)
        self._stats.num_scored_by_role[role] += score.num_rounds
        self._stats.num_confirmed_by_role[role] += score.num_confirmed

    def _publish(self) -> None:
        snapshot = self._stats.snapshot()
        snapshot.num_streams = len(self._streams)
        snapshot.num_sessions = len(self._sessions)
        snapshot.num_pending = len(self._pending)
        for stream in self._streams.values():
            snapshot.num_frames_dropped += stream.transport.num_dropped
        self._snapshot = snapshot
