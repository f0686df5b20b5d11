"""``make fuzz-frames``: damaged and forged frames never crash either end of a draft stream.

A target's link and a draft replica's service talk over a wire that damages frames in both
directions, in their bytes or, decodable, in their fields. Both must go on: a frame is undecodable,
its session is refused (``MalformedMessageError``, inside), or it is taken. The drafter is never
asked what the protocol does not allow, the target is never given a draft that is not one, bounds
hold, and another target on the same service, whose frames arrive whole, keeps getting its tables.
A number and a seed always give the same inputs.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Generic

from google.protobuf.message import DecodeError

from deployments.engine.speculation import wire
from deployments.engine.speculation.draft_service import DraftLimits, DraftService
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.pool_link import LinkLimits, PoolLink, Round
from deployments.engine.speculation.session import PoolSession
from deployments.engine.speculation.speculator_stats import PoolCounters
from deployments.engine.speculation.transport import (
    InT,
    OutT,
    Received,
    TargetTransport,
    Transport,
    TransportState,
)
from deployments.engine.speculation.types import (
    Ask,
    DraftOrigin,
    DraftQuery,
    DraftSampling,
    DraftTree,
    OutcomeRow,
    SessionSpec,
)
from protos import draft_pb2

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message

VOCAB_SIZE = 300
"""Ids from 128 on take two bytes on the wire."""
NUM_SESSIONS = 4
_LIMITS = DraftLimits(max_sessions=24, max_session_tokens=400, idle_timeout_s=2.0)
_ASK = Ask(3, 2)
_STEP_S = 0.01
_STEPS_PER_TEXT = 40
_WITNESS_EVERY = 16
_EXTREMES = (0, 1, 2, 127, 128, 511, 512, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_LARGE_EXTREMES = ((1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_FLOATS = (0.0, -1.0, 1.0, 1e308, float("nan"), float("inf"), -float("inf"))
_TEXTS = ("", "x", "00-" + "a" * 32 + "-" + "b" * 16 + "-01", "\0", "é" * 200)


class BrokenPromiseError(Exception):
    """An end did what no frame may make it do."""


class _End(Transport[OutT, InT], Generic[OutT, InT]):
    """One end of the wire; what arrives and leaves is moved by hand."""

    def __init__(self) -> None:
        self.arrived: list[Received[InT]] = []
        self.sent: list[OutT] = []

    def send(self, frame: OutT) -> bool:
        self.sent.append(frame)
        return True

    def receive(self) -> list[Received[InT]]:
        arrived, self.arrived = self.arrived, []
        return arrived

    def close(self) -> None:
        raise BrokenPromiseError("a frame ended the stream")

    @property
    def state(self) -> TransportState:
        return TransportState.OPEN

    @property
    def num_dropped(self) -> int:
        return 0


class _TargetEnd(_End[draft_pb2.TargetFrame, draft_pb2.DraftFrame], TargetTransport):
    @property
    def welcome(self) -> draft_pb2.Welcome:
        return draft_pb2.Welcome(protocol_version=1, max_session_tokens=_LIMITS.max_session_tokens)

    @property
    def refusal(self) -> None:
        return None


class CheckedDrafter(Drafter):
    """Guesses that ids go on counting, and checks what it is asked."""

    def __init__(self) -> None:
        self.open_ids: set[int] = set()

    def open(self, session: SessionSpec) -> None:
        self._check(session.session_id not in self.open_ids, "opened twice")
        self._check_ids(session.token_ids)
        self.open_ids.add(session.session_id)

    def close(self, session_id: int) -> None:
        self.open_ids.remove(session_id)

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        return [self._rows(query) for query in queries]

    def _rows(self, query: DraftQuery) -> list[OutcomeRow]:
        tree = query.in_flight
        self._check(query.session_id in self.open_ids, "not open")
        self._check(0 < len(query.token_ids) <= _LIMITS.max_session_tokens, "text too long")
        self._check(len(tree) <= wire.MAX_IN_FLIGHT_NODES, "too much in flight")
        self._check(query.num_draft_tokens <= wire.MAX_DRAFT_TOKENS, "too long a draft")
        self._check(1 <= query.fanout <= wire.MAX_FANOUT, "no proper fan-out")
        self._check_ids(query.token_ids)
        self._check_ids(tree.token_ids)
        self._check(all(-1 <= parent < node for node, parent in enumerate(tree.parents)), "no tree")
        rows = []
        for node in range(len(tree) - 1, -2, -1):
            last = query.token_ids[-1] if node < 0 else tree.token_ids[node]
            follow = [(last + 1 + n) % VOCAB_SIZE for n in range(query.num_draft_tokens + 1)]
            rows.append(OutcomeRow(node, follow[0], tuple(follow[1:])))
        return rows

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        is_sound = all(0 <= token_id < VOCAB_SIZE for token_id in token_ids)
        self._check(is_sound, "ids outside the vocabulary")

    def _check(self, is_kept: bool, what: str) -> None:
        if not is_kept:
            raise BrokenPromiseError(what)


class _Target:
    """A target whose texts count upwards, linked to the service."""

    def __init__(self, service: DraftService, tenant: str, num_sessions: int) -> None:
        self.end = _TargetEnd()
        self.far_end: _End[draft_pb2.DraftFrame, draft_pb2.TargetFrame] = _End()
        service.accept(self.far_end)
        self.counters = PoolCounters()
        self.num_rounds = 0
        self.num_hits = 0
        self._tenant = tenant
        self._link = PoolLink("here:1", LinkLimits(), random.Random(0), 0.0)  # noqa: S311
        self._link.adopt(self.end, 0.0)
        self._link.check(0.0)
        self._texts: dict[int, list[int]] = {}
        self._num_opened = 0
        for _ in range(num_sessions):
            self.open()

    def open(self) -> None:
        """A new sequence begins."""
        self._num_opened += 1
        key = self._num_opened
        self._texts[key] = [(31 * key + n) % VOCAB_SIZE for n in range(8)]
        spec = SessionSpec(
            session_id=key,
            request_id=f"r{key}",
            tenant=self._tenant,
            token_ids=tuple(self._texts[key]),
            sampling=DraftSampling(seed=key, temperature=0.8, top_p=0.9),
        )
        self._link.add(PoolSession(spec, VOCAB_SIZE))

    def replace_oldest(self, now: float) -> None:
        """The oldest sequence ends, another one begins."""
        key = min(self._texts)
        del self._texts[key]
        self._link.remove(key, now)
        self.open()

    def step(self, now: float) -> list[bytes]:
        """Take what arrived, begin a round of all sequences; frames to send."""
        self._link.receive(self.counters)
        rounds = []
        for key, session in self._link.sessions.items():
            text = self._texts[key]
            draft, chances = session.draft_after(text)
            if len(draft) > wire.MAX_DRAFT_TOKENS + wire.MAX_IN_FLIGHT_NODES + 1:
                raise BrokenPromiseError("an endless draft")
            if any(not 0 <= token_id < VOCAB_SIZE for token_id in draft):
                raise BrokenPromiseError("a draft outside the vocabulary")
            if len(chances) > len(draft) or any(not 0 <= chance <= 1 for chance in chances):
                raise BrokenPromiseError("chances that are none")
            tree = DraftTree.chain(draft[: _ASK.num_draft_tokens], DraftOrigin.POOL)
            rounds.append(Round(session, list(text), tree, _ASK))
            self.num_rounds += 1
            self.num_hits += bool(draft)
        self._link.send(rounds, now)
        for text in self._texts.values():
            text.append((text[-1] + 1) % VOCAB_SIZE)
        sent, self.end.sent = self.end.sent, []
        return [frame.SerializeToString() for frame in sent]


def run(num_inputs: int, seed: int = 0) -> dict[str, int]:
    """Try inputs; counts by outcome.

    Raises:
        BrokenPromiseError: see the module. Whatever else is raised is a crash.
    """
    rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    now = 0.0
    drafter = CheckedDrafter()
    service = DraftService(drafter, vocab_size=VOCAB_SIZE, limits=_LIMITS, clock=lambda: now)
    damaged, witness = _Target(service, "damaged", NUM_SESSIONS), _Target(service, "whole", 1)
    outcomes = Counter(dict.fromkeys(("undecodable", "refused", "taken"), 0))
    num_steps = 0
    # Every third frame arrives whole, so that there are sessions to damage.
    while outcomes.total() < num_inputs:
        num_steps += 1
        now += _STEP_S
        if num_steps % _STEPS_PER_TEXT == 0:
            damaged.replace_oldest(now)
        for data in damaged.step(now):
            damaged.far_end.arrived += _decoded(data, draft_pb2.TargetFrame, rng, now, outcomes)
        if num_steps % _WITNESS_EVERY == 0:
            if num_steps % (_WITNESS_EVERY * _STEPS_PER_TEXT) == 0:
                witness.replace_oldest(now)
            whole = [draft_pb2.TargetFrame.FromString(data) for data in witness.step(now)]
            witness.far_end.arrived += [Received(frame, now) for frame in whole]
        refused_before = _num_refused(service, damaged)
        service.step()
        for reply in damaged.far_end.sent:
            # Measured time is the one thing that differs between two runs.
            reply.load.batch_us = 1_500
            data = reply.SerializeToString()
            damaged.end.arrived += _decoded(data, draft_pb2.DraftFrame, rng, now, outcomes)
        damaged.far_end.sent.clear()
        witness.end.arrived += [Received(reply, now) for reply in witness.far_end.sent]
        witness.far_end.sent.clear()
        num_refused = _num_refused(service, damaged) - refused_before
        outcomes["refused"] += num_refused
        outcomes["taken"] -= num_refused
        _check(service, drafter)
    if witness.num_rounds and witness.num_hits < 0.9 * witness.num_rounds - 2:
        raise BrokenPromiseError(f"the other target had {witness.num_hits} of {witness.num_rounds}")
    return dict(outcomes)


def _decoded(
    data: bytes, kind: type[InT], rng: random.Random, now: float, outcomes: Counter[str]
) -> list[Received[InT]]:
    """The frame, mostly another one than was sent; none if it is none."""
    if rng.random() < 1 / 3:
        return [Received(kind.FromString(data), now)]
    try:
        if rng.random() < 0.5:
            frame = kind.FromString(_damaged_bytes(data, rng))
        else:
            frame = kind.FromString(data)
            _forge(frame, rng)
    except DecodeError:
        outcomes["undecodable"] += 1
        return []
    outcomes["taken"] += 1
    return [Received(frame, now)]


def _damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    kind = rng.randrange(5)
    start = rng.randrange(len(changed))
    if kind == 0:  # flipped bits
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # a torn end
        del changed[start:]
    elif kind == 2:  # bytes missing within
        del changed[start : start + rng.randint(1, 8)]
    elif kind == 3:  # a stretch said twice
        changed[start:start] = changed[start : start + rng.randint(1, 40)]
    else:  # noise
        changed[start : start + rng.randint(1, 16)] = rng.randbytes(rng.randint(0, 24))
    return bytes(changed)


def _forge(frame: Message, rng: random.Random) -> None:
    """Another value in one to three fields, somewhere in the frame."""
    for _ in range(rng.randint(1, 3)):
        message = frame
        while True:
            field = rng.choice(message.DESCRIPTOR.fields)
            if field.type != field.TYPE_MESSAGE:
                _set(message, field, rng)
                break
            if not field.is_repeated:
                message = getattr(message, field.name)
                continue
            items = getattr(message, field.name)
            if not items or rng.random() < 0.1:
                items.add()
            elif rng.random() < 0.1:
                items.add().CopyFrom(rng.choice(items))
            message = rng.choice(items)


def _set(message: Message, field: FieldDescriptor, rng: random.Random) -> None:
    value = _value(field, rng)
    if not field.is_repeated:
        setattr(message, field.name, value)
        return
    items = getattr(message, field.name)
    kind = rng.randrange(4)
    if kind == 0:
        items.extend([value] * rng.choice((1, 1, 2, 40, 600)))
    elif kind == 1 and items:
        items[rng.randrange(len(items))] = value
    elif kind == 2 and items:
        del items[rng.randrange(len(items)) :]
    else:
        items.extend(list(items))


def _value(field: FieldDescriptor, rng: random.Random) -> object:
    if field.type == field.TYPE_STRING:
        return rng.choice(_TEXTS)
    if field.type == field.TYPE_BYTES:
        return rng.randbytes(rng.choice((0, 1, 5, 600)))
    if field.type == field.TYPE_DOUBLE:
        return rng.choice(_FLOATS)
    if field.type == field.TYPE_ENUM:
        return rng.randrange(7)
    is_small = field.type == field.TYPE_UINT32
    if rng.random() < 0.5:
        return rng.randrange(16)
    return rng.choice(_EXTREMES if is_small else (*_EXTREMES, *_LARGE_EXTREMES))


def _num_refused(service: DraftService, target: _Target) -> int:
    return target.counters.num_malformed + service.stats().num_dropped_by_reason["malformed"]


def _check(service: DraftService, drafter: CheckedDrafter) -> None:
    stats = service.stats()
    if stats.num_drafter_failures:
        raise BrokenPromiseError("the drafter was asked what it may not be asked")
    if not stats.num_sessions == len(drafter.open_ids) <= _LIMITS.max_sessions:
        raise BrokenPromiseError("sessions leak")


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # A warning for each refusal is right in service, and too much here.
    logging.getLogger("deployments.engine.speculation").setLevel(logging.CRITICAL)
    start = time.monotonic()
    outcomes = run(arguments.inputs, arguments.seed)
    for outcome, count in outcomes.items():
        sys.stdout.write(f"{count:10} {outcome}\n")
    num_inputs = sum(outcomes.values())
    sys.stdout.write(f"{num_inputs} inputs in {time.monotonic() - start:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
