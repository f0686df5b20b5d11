"""The ways to get drafts that are compared, as one speculator that can be switched."""

from __future__ import annotations

import time
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from deployments.engine.speculation import wire
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.drafters.suffix import SuffixDrafter
from deployments.engine.speculation.speculator import (
    NOTHING_ELSE,
    NoSpeculation,
    Speculator,
    TakenDraft,
)
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.speculation.transport import TransportState
from deployments.engine.speculation.types import (
    DraftOrigin,
    DraftQuery,
    DraftSampling,
    DraftTree,
    OutcomeRow,
    SessionSpec,
)
from protos import draft_pb2
from tests.bench.split.clock import PacedDrafter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from deployments.engine.config import SpeculationConfig
    from deployments.engine.speculation.speculator import DraftRequest, RoundResult, StepLoad
    from deployments.engine.speculation.transport import Connector, TargetTransport
    from tests.bench.split.distance import Distance

T = TypeVar("T")

_POLL_S = 0.0005
_PATIENCE_S = 60.0
_EMPTY = DraftTree()


class Mode(StrEnum):
    """How a batch is decoded."""

    PLAIN = "plain"
    LOCAL = "local"
    """A suffix drafter in the target's process, no pool."""
    COLOCATED = "colocated"
    """A head beside the target, or without one the pool's own drafter in the target's process: its
    forwards stand between two steps."""
    CHAIN = "chain"
    """That one and the suffix drafter, verified together."""
    SYNC = "sync"
    """The pool is asked behind every step, and waited for."""
    PULL = "pull"
    """The pool works one round ahead and keeps its tables; a row is fetched behind every step."""
    PUSH = "push"
    """The pool works one round ahead and sends its tables; nothing is waited for."""
    SPLIT = "split"
    """As served: pushed tables, then the local drafter, then nothing; a budget decides."""
    TREES = "trees"
    """Branching guesses, right and wrong ones, of random sizes."""


def all_modes(
    config: SpeculationConfig,
    vocab_size: int,
    connect: Connector,
    distance: Distance,
    colocated: Drafter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Mode, Speculator]:
    """A speculator per mode that has one.

    Args:
        config: with a head, that one is the drafter beside the target.
        colocated: runs on the engine's thread; without it or a head there is no such mode.
        clock: seconds; budgets come from what it says steps take.
    """
    pool_only = config.model_copy(update={"local_drafter": "none"})
    here: dict[str, Any] = {"vocab_size": vocab_size, "clock": clock}
    far = here | {"connect": distance.to(connect)}
    beside: dict[Mode, Speculator] = {}
    if config.head is not None:
        beside = {
            Mode.COLOCATED: SplitSpeculator(pool_only, **here),
            Mode.CHAIN: SplitSpeculator(config, **here),
        }
    elif colocated is not None:
        suffix = SuffixDrafter()
        beside = {
            Mode.COLOCATED: SplitSpeculator(config, local_drafter=Joint(colocated), **here),
            Mode.CHAIN: SplitSpeculator(config, local_drafter=Joint(suffix, colocated), **here),
        }
    return beside | {
        Mode.LOCAL: SplitSpeculator(config, **here),
        Mode.SYNC: _SyncSpeculator(far["connect"], vocab_size, config.num_draft_tokens),
        Mode.PULL: _PullSpeculator(distance, pool_only, **far),
        Mode.PUSH: SplitSpeculator(pool_only, **far),
        Mode.SPLIT: SplitSpeculator(config, **far),
    }


class Joint(Drafter):
    """Several drafters, each asked for what it thinks likeliest."""

    def __init__(self, *drafters: Drafter) -> None:
        self.drafters = drafters

    def open(self, session: SessionSpec) -> None:
        for drafter in self.drafters:
            drafter.open(session)

    def append(self, session_id: int, token_ids: Sequence[int]) -> None:
        for drafter in self.drafters:
            drafter.append(session_id, token_ids)

    def close(self, session_id: int) -> None:
        for drafter in self.drafters:
            drafter.close(session_id)

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        first = [replace(query, fanout=1) for query in queries]
        answers = [drafter.propose(first) for drafter in self.drafters]
        return [[row for rows in own for row in rows] for own in zip(*answers, strict=True)]


class Modes(Speculator):
    """Forwards to the speculator of the current mode.

    Attributes:
        mode: may be changed while nothing runs.
        stalls_s: what speculation took of each step in the current mode.
        head: beside the target, if the engine has one.
    """

    def __init__(self, speculators: Mapping[Mode, Speculator]) -> None:
        self.mode = Mode.PLAIN
        self.stalls_s: list[float] = []
        self.head: PacedDrafter | None = None
        self._speculators = {Mode.PLAIN: NoSpeculation(), **speculators}
        self._stall_s = 0.0

    def add_head(self, head: Drafter) -> None:
        """Have it draft in the modes with a drafter beside the target."""
        self.head = PacedDrafter(head, 0.0)
        for mode in (Mode.COLOCATED, Mode.CHAIN):
            self._speculators[mode].add_head(self.head)

    def attach(self, request_id: str, endpoint: str) -> None:
        """Have a request drafted for from there, in modes with a pool."""
        speculator = self._current
        if isinstance(speculator, (SplitSpeculator, _SyncSpeculator)):
            speculator.attach(request_id, endpoint)

    def teach(self, tenant: str, texts: Sequence[Sequence[int]]) -> None:
        """Have the local drafter take these for outputs that the tenant had before."""
        speculator = self._current
        if not isinstance(speculator, SplitSpeculator):
            return
        drafter = speculator._local.drafter
        if isinstance(drafter, Joint):
            drafter = drafter.drafters[0]
        if not isinstance(drafter, SuffixDrafter):
            return
        for number, text in enumerate(texts):
            session = SessionSpec(
                session_id=-1 - number,
                request_id="",
                tenant=tenant,
                token_ids=(),
                sampling=DraftSampling(seed=0),
            )
            drafter.open(session)
            drafter.append(session.session_id, text)
            drafter.close(session.session_id)
            while drafter._ended:  # it learns a little with each step, and these are long past
                drafter.propose(())

    def detach(self, request_id: str) -> None:
        """The request has ended."""
        if isinstance(self._current, SplitSpeculator):
            self._current.detach(request_id)

    @property
    def _current(self) -> Speculator:
        return self._speculators[self.mode]

    def open(self, session: SessionSpec) -> None:
        self._current.open(session)

    def take(
        self, requests: Sequence[DraftRequest], load: StepLoad = NOTHING_ELSE
    ) -> list[TakenDraft]:
        self._stall_s = 0.0
        return self._timed(lambda: self._current.take(requests, load))

    def verifying(self, rounds: Sequence[tuple[DraftRequest, DraftTree]]) -> None:
        self._timed(lambda: self._current.verifying(rounds))

    def verified(self, results: Sequence[RoundResult]) -> None:
        self._timed(lambda: self._current.verified(results))
        self.stalls_s.append(self._stall_s)

    def close(self, session_id: int) -> None:
        self._current.close(session_id)

    def shutdown(self) -> None:
        for speculator in self._speculators.values():
            speculator.shutdown()

    def _timed(self, call: Callable[[], T]) -> T:
        began = time.perf_counter()
        try:
            return call()
        finally:
            self._stall_s += time.perf_counter() - began


class _PullSpeculator(SplitSpeculator):
    """Tables stay with their drafter, so a row costs a round trip once its outcome is known."""

    def __init__(self, distance: Distance, config: SpeculationConfig, **told: Any) -> None:
        super().__init__(config, **told)
        self._distance = distance

    def take(
        self, requests: Sequence[DraftRequest], load: StepLoad = NOTHING_ELSE
    ) -> list[TakenDraft]:
        time.sleep(self._distance.round_trip_s)
        return super().take(requests, load)


class _SyncSpeculator(Speculator):
    """Asks what follows the committed text and waits, as where nothing is done ahead."""

    def __init__(self, connect: Connector, vocab_size: int, num_draft_tokens: int) -> None:
        self._connect = connect
        self._vocab_size = vocab_size
        self._num_draft_tokens = num_draft_tokens
        self._endpoint = ""
        self._transport: TargetTransport | None = None
        self._specs: dict[int, SessionSpec] = {}
        self._num_sent: dict[int, int] = {}
        self._round = 0

    def attach(self, request_id: str, endpoint: str) -> None:
        """All requests are drafted for from the same endpoint."""
        del request_id
        if endpoint != self._endpoint:
            self.shutdown()
        self._endpoint = endpoint

    def open(self, session: SessionSpec) -> None:
        self._specs[session.session_id] = session

    def take(
        self, requests: Sequence[DraftRequest], load: StepLoad = NOTHING_ELSE
    ) -> list[TakenDraft]:
        del load
        if not requests:
            return []
        transport = self._dialled()
        frame = draft_pb2.TargetFrame()
        self._round += 1
        for request in requests:
            key, text = request.session_id, request.token_ids
            if key not in self._num_sent:
                frame.opens.append(wire.open_to_wire(self._specs[key], 1, text))
                self._num_sent[key] = len(text)
            frame.commits.add(
                session=key,
                epoch=1,
                round=self._round,
                base_len=len(text),
                committed=text[self._num_sent[key] :],
                num_draft_tokens=self._num_draft_tokens - 1,
                fanout=1,
            )
            self._num_sent[key] = len(text)
        transport.send(frame)
        drafts = self._answers(transport, {request.session_id for request in requests})
        return [
            _taken(drafts[request.session_id][: request.max_draft_tokens]) for request in requests
        ]

    def verifying(self, rounds: Sequence[tuple[DraftRequest, DraftTree]]) -> None:
        del rounds

    def verified(self, results: Sequence[RoundResult]) -> None:
        del results

    def close(self, session_id: int) -> None:
        self._specs.pop(session_id, None)
        if self._num_sent.pop(session_id, None) is not None and self._transport is not None:
            frame = draft_pb2.TargetFrame()
            frame.closes.add(session=session_id, epoch=1)
            self._transport.send(frame)

    def shutdown(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._transport = None

    def _dialled(self) -> TargetTransport:
        if self._transport is None:
            self._transport = self._connect(self._endpoint)
            deadline = time.monotonic() + _PATIENCE_S
            while self._transport.state is TransportState.CONNECTING:
                _wait(deadline)
        return self._transport

    def _answers(self, transport: TargetTransport, waiting: set[int]) -> dict[int, tuple[int, ...]]:
        drafts: dict[int, tuple[int, ...]] = {}
        deadline = time.monotonic() + _PATIENCE_S
        while drafts.keys() != waiting:
            for frame, _ in transport.receive():
                for table in frame.tables:
                    if table.round == self._round:
                        rows = wire.rows_from_wire(table.rows, _EMPTY, self._vocab_size)
                        best = rows[0]
                        drafts[table.session] = (best.bonus_token_id, *best.draft_token_ids)
            _wait(deadline)
        return drafts


def _wait(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("the draft pool does not answer")
    time.sleep(_POLL_S)


def _taken(draft: tuple[int, ...]) -> TakenDraft:
    tree = DraftTree.chain(draft, DraftOrigin.POOL) if draft else _EMPTY
    return TakenDraft(tree=tree, table_hit=bool(draft))
