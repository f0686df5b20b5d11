"""The link from this target to one draft replica: one stream at a time, many sessions on it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.speculation.ask_pace import AskPace
from deployments.engine.speculation.errors import MalformedMessageError
from deployments.engine.speculation.transport import TransportState
from deployments.engine.speculation.types import Ask, DraftTree
from protos import draft_pb2

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Sequence

    from deployments.engine.speculation.session import PoolSession
    from deployments.engine.speculation.speculator_stats import PoolCounters
    from deployments.engine.speculation.transport import TargetTransport

logger = logging.getLogger(__name__)

_PLAIN = DraftTree()
_WAY_WEIGHT = 0.1
"""Of the newest table in what is known of the time that commits and tables travel and wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimits:
    """Bounds of a link.

    A dial into a network that loses everything hangs, also when bytes pass again meanwhile. So the
    next one begins within the sum of ``connect_timeout_s`` and ``max_backoff_s``, however long it
    was away, and a drafter that can be reached again is soon at work.

    Attributes:
        connect_timeout_s: from dialling to the drafter's welcome.
        backoff_s: wait before the first reconnect; doubles up to ``max_backoff_s``, and the half
            of it is random so that targets do not return in step.
        idle_close_s: a link without sessions is closed after this.
        max_frame_tokens: text tokens in one frame; longer texts are spread over several.
    """

    connect_timeout_s: float = 2.5
    backoff_s: float = 0.2
    max_backoff_s: float = 1.0
    idle_close_s: float = 30.0
    max_frame_tokens: int = 65_536


class LinkState(StrEnum):
    """Whether a link can carry sessions."""

    DOWN = "down"
    CONNECTING = "connecting"
    UP = "up"
    REFUSED = "refused"


class Round(NamedTuple):
    """A round of one session that begins now."""

    session: PoolSession
    token_ids: Sequence[int]
    in_flight: DraftTree
    ask: Ask


class PoolLink:
    """Not thread-safe; ``PoolClient`` holds its lock around every call."""

    def __init__(self, endpoint: str, limits: LinkLimits, rng: random.Random, now: float) -> None:
        self.endpoint = endpoint
        self.state = LinkState.DOWN
        self.sessions: dict[int, PoolSession] = {}
        self._limits = limits
        self._rng = rng
        self._transport: TargetTransport | None = None
        self._since = now
        self._retry_at = now
        self._num_failures = 0
        self._closes: list[draft_pb2.Close] = []
        self._num_dropped_seen = 0
        self._pace = AskPace()
        self._way_s = 0.0

    def add(self, session: PoolSession) -> None:
        """Serve a session from the next frame on."""
        self.sessions[session.spec.session_id] = session

    def remove(self, session_id: int, now: float) -> None:
        """Stop serving a session; unknown ids are ignored."""
        session = self.sessions.pop(session_id, None)
        if session is not None and session.is_live:
            self._closes.append(session.close())
        if not self.sessions:
            self._since = now

    def wants_transport(self, now: float) -> bool:
        """Whether it is time to dial."""
        return self.state is LinkState.DOWN and bool(self.sessions) and now >= self._retry_at

    def adopt(self, transport: TargetTransport, now: float) -> None:
        """Use a transport that has begun to connect."""
        self._transport = transport
        self.state = LinkState.CONNECTING
        self._since = now
        self._num_dropped_seen = 0

    def is_idle(self, now: float) -> bool:
        """Whether nobody has used the link for long."""
        return not self.sessions and now - self._since >= self._limits.idle_close_s

    def release(self) -> TargetTransport | None:
        """Give the transport up; the caller closes it. The link is down afterwards."""
        transport, self._transport = self._transport, None
        self.state = LinkState.DOWN
        self._closes.clear()
        for session in self.sessions.values():
            session.suspend()
        return transport

    def check(self, now: float) -> bool:
        """Follow the transport's state.

        Returns:
            Whether the stream was lost or refused just now.
        """
        transport = self._transport
        if transport is None:
            return False
        if transport.state is TransportState.OPEN:
            if self.state is LinkState.CONNECTING:
                self.state = LinkState.UP
                self._num_failures = 0
                logger.info("draft link to %s is up", self.endpoint)
            return False
        if (
            transport.state is TransportState.CONNECTING
            and now - self._since < self._limits.connect_timeout_s
        ):
            return False
        refusal = transport.refusal
        self.release()
        transport.close()
        if refusal is not None:
            self.state = LinkState.REFUSED
            logger.warning("draft replica %s refuses this target: %s", self.endpoint, refusal)
            return True
        wait_s = min(self._limits.backoff_s * 2.0**self._num_failures, self._limits.max_backoff_s)
        self._retry_at = now + wait_s * self._rng.uniform(0.5, 1.0)
        self._num_failures = min(self._num_failures + 1, 16)
        logger.info("draft link to %s is lost; next try in %.1f s", self.endpoint, wait_s)
        return True

    def receive(self, counters: PoolCounters) -> None:
        """Hand everything that arrived to its sessions."""
        if self._transport is None or self.state is not LinkState.UP:
            return
        for frame, at in self._transport.receive():
            for table in frame.tables:
                self._on_table(table, at, counters)
            for resync in frame.resyncs:
                self._on_resync(resync, counters)
            for dropped in frame.drops:
                session = self.sessions.get(dropped.session)
                if session is not None and session.on_dropped(dropped):
                    counters.num_sessions_dropped += 1
            if frame.HasField("load"):
                counters.num_pool_pending = frame.load.num_pending
                counters.pool_batch_time_s = frame.load.batch_us * 1e-6
        num_dropped = self._transport.num_dropped
        counters.num_frames_dropped += num_dropped - self._num_dropped_seen
        self._num_dropped_seen = num_dropped

    def send(self, rounds: Iterable[Round], now: float) -> None:
        """Put the closes, opens and rounds at hand into one frame and queue it.

        A frame without room is not repaired here: the drafter finds the gap in the next one.
        Rounds of live sessions go first; opens share what room is left, the rest waits.
        """
        if self._transport is None or self.state is not LinkState.UP:
            return
        frame = draft_pb2.TargetFrame(closes=self._closes)
        room = self._limits.max_frame_tokens
        waiting: list[Round] = []
        for item in rounds:
            if not item.session.is_live:
                waiting.append(item)
            elif room > 0:
                room -= self._commit(frame, item, room, now)
        for item in waiting:
            if not item.session.may_open:
                item.session.pass_round()
            elif room > 0 and self._has_space_for(item):
                opened = item.session.open(item.token_ids, room)
                frame.opens.append(opened)
                room -= len(opened.token_ids)
                if item.session.num_sent == len(item.token_ids):
                    self._commit(frame, item, room, now)
        if not (frame.closes or frame.opens or frame.commits):
            return
        if self._transport.send(frame):
            self._closes.clear()

    def send_prompts(self, now: float, ask: Ask) -> None:
        """Open sessions before their first round, so that the drafter reads while we prefill."""
        rounds = [
            Round(session, session.spec.token_ids, _PLAIN, ask)
            for session in self.sessions.values()
            if session.may_open
            or (session.is_live and session.num_sent < len(session.spec.token_ids))
        ]
        if rounds or self._closes:
            self.send(rounds, now)

    def _commit(self, frame: draft_pb2.TargetFrame, item: Round, room: int, now: float) -> int:
        ask = self._pace.limit(item.ask)
        ask = ask._replace(within_s=max(0.0, ask.within_s - self._way_s))
        commit = item.session.commit(item.token_ids, item.in_flight, ask, room, now)
        frame.commits.append(commit)
        return len(commit.committed)

    def _has_space_for(self, item: Round) -> bool:
        welcome = None if self._transport is None else self._transport.welcome
        return welcome is not None and len(item.token_ids) < welcome.max_session_tokens

    def _on_table(self, table: draft_pb2.Table, at: float, counters: PoolCounters) -> None:
        session = self.sessions.get(table.session)
        if session is None:
            return
        try:
            receipt = session.on_table(table, at)
        except MalformedMessageError as error:
            self._quarantine(session, error, counters)
            return
        if receipt is not None:
            self._pace.on_table(is_late=receipt.is_late)
            counters.on_table(receipt.round_trip_s, is_late=receipt.is_late)
            way_s = max(0.0, receipt.round_trip_s - counters.pool_batch_time_s)
            self._way_s += _WAY_WEIGHT * (way_s - self._way_s)

    def _on_resync(self, resync: draft_pb2.Resync, counters: PoolCounters) -> None:
        session = self.sessions.get(resync.session)
        if session is None:
            return
        try:
            if session.on_resync(resync):
                counters.num_resyncs += 1
        except MalformedMessageError as error:
            self._quarantine(session, error, counters)

    def _quarantine(
        self, session: PoolSession, error: MalformedMessageError, counters: PoolCounters
    ) -> None:
        logger.warning("draft replica %s broke the protocol: %s", self.endpoint, error)
        session.quarantine()
        counters.num_malformed += 1
