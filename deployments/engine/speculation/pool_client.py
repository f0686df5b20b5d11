"""All links of this target to the draft pool, and which session is served by which."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.speculation.outcome_table import NOTHING, Continuation
from deployments.engine.speculation.pool_link import LinkLimits, LinkState, PoolLink, Round
from deployments.engine.speculation.session import PoolSession
from deployments.engine.speculation.speculator_stats import PoolCounters

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.engine.speculation.speculator import DraftRequest
    from deployments.engine.speculation.speculator_stats import SpeculatorStats
    from deployments.engine.speculation.transport import Connector, TargetTransport
    from deployments.engine.speculation.types import Ask, DraftTree, SessionSpec

logger = logging.getLogger(__name__)

_MAX_COMMANDS = 16_384
_MAX_UNCLAIMED = 4_096


class PoolDraft(NamedTuple):
    """What the pool has for a sequence.

    Attributes:
        ahead: a chain; empty if no row fits.
        was_asked: the pool serves this sequence and was asked for a table.
        is_silent: its newest table holds no row.
    """

    ahead: Continuation
    was_asked: bool
    is_silent: bool = False


class _Command(NamedTuple):
    request_id: str
    endpoint: str | None


class PoolClient:
    """Thread-safe. The engine thread works on sessions, another one calls ``upkeep``.

    ``attach`` and ``detach`` only queue a command, so an event loop may call them. A request may be
    attached before its session opens or after.

    Args:
        connect: starts a transport to an endpoint.
        prompt_ask: the table wanted for the first round, while the target still prefills.
        clock: seconds; the one the transports stamp arrivals with.
    """

    def __init__(
        self,
        connect: Connector,
        *,
        vocab_size: int,
        prompt_ask: Ask,
        limits: LinkLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.counters = PoolCounters()
        self._connect = connect
        self._vocab_size = vocab_size
        self._prompt_ask = prompt_ask
        self._limits = limits or LinkLimits()
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter
        self._lock = threading.Lock()
        self._commands: deque[_Command] = deque()
        self._unclaimed: dict[str, str] = {}
        self._sessions: dict[int, PoolSession] = {}
        self._session_ids: dict[str, int] = {}
        self._links: dict[str, PoolLink] = {}
        self._link_of: dict[int, PoolLink] = {}

    def attach(self, request_id: str, endpoint: str) -> None:
        """Serve a request from the draft replica at ``endpoint``, from now on or once it opens."""
        self._command(_Command(request_id, endpoint))

    def detach(self, request_id: str) -> None:
        """Stop serving a request from the pool; unknown ids are ignored."""
        self._command(_Command(request_id, None))

    def open(self, spec: SessionSpec) -> None:
        """A sequence begins."""
        with self._lock:
            self._sessions[spec.session_id] = PoolSession(spec, self._vocab_size)
            self._session_ids[spec.request_id] = spec.session_id
            self._run_commands()
            endpoint = self._unclaimed.pop(spec.request_id, None)
            if endpoint is not None:
                self._assign(spec.session_id, endpoint)

    def close(self, session_id: int) -> None:
        """A sequence ended; unknown ids are ignored."""
        with self._lock:
            session = self._sessions.pop(session_id, None)
            if session is None:
                return
            self._assign(session_id, None)
            if self._session_ids.get(session.spec.request_id) == session_id:
                del self._session_ids[session.spec.request_id]

    def drafts(self, requests: Sequence[DraftRequest]) -> list[PoolDraft]:
        """What the tables at hand say about each sequence, with all that has arrived."""
        with self._lock:
            self._receive()
            return [self._draft(request) for request in requests]

    def announce(self, rounds: Sequence[tuple[DraftRequest, DraftTree, Ask]]) -> None:
        """Tell the drafters what is being verified: one frame per link."""
        with self._lock:
            self._run_commands()
            now = self._clock()
            by_link: dict[str, list[Round]] = {}
            for request, tree, ask in rounds:
                link = self._link_of.get(request.session_id)
                if link is not None:
                    session = self._sessions[request.session_id]
                    item = Round(session, request.token_ids, tree, ask)
                    by_link.setdefault(link.endpoint, []).append(item)
            for endpoint, link in self._links.items():
                link.send(by_link.get(endpoint, ()), now)

    def upkeep(self) -> list[str]:
        """Dial, redial, give up idle links and open sessions early. Never from the engine thread.

        Returns:
            Endpoints whose stream was lost or refused since the last call.
        """
        now = self._clock()
        to_close: list[TargetTransport] = []
        with self._lock:
            self._run_commands()
            lost = [link.endpoint for link in self._links.values() if link.check(now)]
            self.counters.num_links_lost += len(lost)
            for link in [link for link in self._links.values() if link.is_idle(now)]:
                del self._links[link.endpoint]
                if (transport := link.release()) is not None:
                    to_close.append(transport)
            to_dial = [link for link in self._links.values() if link.wants_transport(now)]
        for transport in to_close:
            transport.close()
        dialled = [(link, self._connect(link.endpoint)) for link in to_dial]
        with self._lock:
            for link, transport in dialled:
                transport.on_arrival = self._take_in
                link.adopt(transport, now)
            for link in self._links.values():
                link.send_prompts(now, self._prompt_ask)
        return lost

    @property
    def is_dialling(self) -> bool:
        """Whether a link is about to come up, so that ``upkeep`` is wanted soon again."""
        with self._lock:
            return any(link.state is LinkState.CONNECTING for link in self._links.values())

    def shutdown(self) -> None:
        """Close every link."""
        with self._lock:
            links = list(self._links.values())
            self._links.clear()
            self._link_of.clear()
            transports = [link.release() for link in links]
        for transport in transports:
            if transport is not None:
                transport.close()

    def add_to(self, stats: SpeculatorStats) -> SpeculatorStats:
        """The snapshot with what the links count."""
        with self._lock:
            counters = self.counters
            return replace(
                stats,
                num_tables=counters.num_tables,
                num_late_tables=counters.num_late_tables,
                num_frames_dropped=counters.num_frames_dropped,
                num_resyncs=counters.num_resyncs,
                num_sessions_dropped=counters.num_sessions_dropped,
                num_malformed=counters.num_malformed,
                num_links_lost=counters.num_links_lost,
                num_links_up=sum(link.state is LinkState.UP for link in self._links.values()),
                num_pool_sessions=sum(self._sessions[key].is_live for key in self._link_of),
                round_trip_p50_s=counters.round_trip_p50_s,
                num_pool_pending=counters.num_pool_pending,
                pool_batch_time_s=counters.pool_batch_time_s,
            )

    def _take_in(self) -> None:
        """Read what has arrived on a reader's thread, where it costs no step its time."""
        with self._lock:
            self._receive()

    def _receive(self) -> None:
        for link in self._links.values():
            link.receive(self.counters)

    def _command(self, command: _Command) -> None:
        if len(self._commands) >= _MAX_COMMANDS:
            logger.warning("too many attach commands; %s keeps its drafter", command.request_id)
            return
        self._commands.append(command)

    def _run_commands(self) -> None:
        while self._commands:
            request_id, endpoint = self._commands.popleft()
            session_id = self._session_ids.get(request_id)
            if session_id is not None:
                self._assign(session_id, endpoint)
            elif endpoint is None:
                self._unclaimed.pop(request_id, None)
            else:
                self._unclaimed[request_id] = endpoint
                if len(self._unclaimed) > _MAX_UNCLAIMED:
                    del self._unclaimed[next(iter(self._unclaimed))]

    def _assign(self, session_id: int, endpoint: str | None) -> None:
        now = self._clock()
        old = self._link_of.get(session_id)
        if old is not None:
            if old.endpoint == endpoint:
                return
            old.remove(session_id, now)
            del self._link_of[session_id]
        if endpoint is None:
            return
        link = self._links.get(endpoint)
        if link is None:
            link = self._links[endpoint] = PoolLink(endpoint, self._limits, self._rng, now)
        session = self._sessions[session_id]
        session.moved()
        link.add(session)
        self._link_of[session_id] = link

    def _draft(self, request: DraftRequest) -> PoolDraft:
        session = self._sessions.get(request.session_id)
        if session is None:
            return PoolDraft(NOTHING, was_asked=False)
        ahead = session.draft_after(request.token_ids)
        return PoolDraft(ahead, was_asked=session.has_asked, is_silent=session.is_silent)
