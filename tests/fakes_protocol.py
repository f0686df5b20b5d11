"""One target's end and two drafters, with a network between that moves a frame only when told to.

The texts are known beforehand and the drafters are oracles of them, so every wrong step shows.
"""

from __future__ import annotations

import heapq
import random
from functools import cache
from typing import TYPE_CHECKING

from deployments.engine.speculation.draft_service import DraftLimits, DraftService
from deployments.engine.speculation.fake_transport import FakeNetwork, Faults
from deployments.engine.speculation.pool_client import PoolClient
from deployments.engine.speculation.pool_link import LinkLimits
from deployments.engine.speculation.speculator import DraftRequest
from deployments.engine.speculation.types import Ask, DraftOrigin, DraftTree
from protos import draft_pb2
from tests.fakes_speculation import IDENTITY, VOCAB_SIZE, OracleDrafter, random_text, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ENDPOINTS = ("one:1", "two:2")
ASK = Ask(2, 1)
TEXT_LEN = 2_000
LIMITS = DraftLimits()
_NEVER = Faults(min_delay_s=1e9, max_delay_s=1e9)
_CALM_STEPS = 150
"""More than the longest hold of a session and the longest pause of an ask."""


class FailingOracle(OracleDrafter):
    """Fails when it is told to, once."""

    is_about_to_fail = False
    num_failures = 0

    def propose(self, queries):
        if self.is_about_to_fail:
            self.is_about_to_fail = False
            self.num_failures += 1
            raise RuntimeError("told to fail")
        return super().propose(queries)


class ProtocolWorld:
    """Methods that make something happen return False where it would change nothing.

    Args:
        max_frame_tokens: prompts are longer, so that they need several frames. A round commits up
            to four tokens of each session.
    """

    def __init__(self, max_frame_tokens: int) -> None:
        self.network = FakeNetwork(0, _NEVER)
        self.truth: dict[str, list[int]] = {}
        self.services: dict[str, DraftService] = {}
        self.oracles: dict[str, FailingOracle] = {}
        for endpoint in ENDPOINTS:
            self.start(endpoint)
        self.streams: list = []
        self.epochs: dict[int, int] = {}
        self.received: list[draft_pb2.DraftFrame] = []
        self.client = PoolClient(
            self.connect,
            vocab_size=VOCAB_SIZE,
            prompt_ask=ASK,
            limits=LinkLimits(backoff_s=0.0, max_backoff_s=0.0, max_frame_tokens=max_frame_tokens),
            clock=self.network.clock,
            rng=random.Random(0),  # noqa: S311
        )
        self.lengths: dict[int, int] = {}
        self.homes: dict[int, str] = {}
        self.num_hits: dict[int, int] = {}

    def connect(self, endpoint: str):
        """Handshakes take no time; what follows waits for an event."""
        self.network.faults = Faults()
        target_end = self.network.connector(IDENTITY)(endpoint)
        self.network.faults = _NEVER
        self.streams = [end for end in (*self.streams, target_end) if end.is_alive]
        self.listen_in(target_end)
        return target_end

    def listen_in(self, target_end) -> None:
        """Note what arrives, and that every open is a new epoch, whatever came before it."""
        send, receive = target_end.send, target_end.receive

        def checked_send(frame):
            for opening in frame.opens:
                assert opening.epoch > self.epochs.get(opening.session, 0), "an epoch used again"
                self.epochs[opening.session] = opening.epoch
            return send(frame)

        def noted_receive():
            arrived = receive()
            self.received += [frame for frame, _ in arrived]
            return arrived

        target_end.send, target_end.receive = checked_send, noted_receive

    # The target.

    def open(self, endpoint: str, prompt_len: int) -> int:
        key = len(self.truth) + 1
        text = self.truth[f"r{key}"] = _text(key)
        self.lengths[key], self.num_hits[key], self.homes[key] = prompt_len, 0, endpoint
        self.client.open(spec_of(key, text[:prompt_len]))
        self.client.attach(f"r{key}", endpoint)
        return key

    def close(self, key: int) -> None:
        del self.lengths[key], self.homes[key]
        self.client.close(key)

    def move(self, key: int) -> bool:
        self.homes[key] = ENDPOINTS[self.homes[key] == ENDPOINTS[0]]
        self.client.attach(f"r{key}", self.homes[key])
        return True

    def step(self, keys: Iterable[int], guess_of: Callable[[int], tuple[int, ...]] = lambda _: ()):
        """The engine verifies what the pool proposes, or a guess, behind the committed text."""
        requests = [
            DraftRequest(
                session_id=key,
                token_ids=self.truth[f"r{key}"][: self.lengths[key]],
                max_draft_tokens=4,
            )
            for key in keys
        ]
        rounds = []
        for request, draft in zip(requests, self.drafts(requests), strict=True):
            key, at = request.session_id, len(request.token_ids)
            expected = tuple(self.truth[f"r{key}"][at : at + len(draft.ahead.token_ids)])
            assert draft.ahead.token_ids == expected, "a row that disagrees with the text"
            self.num_hits[key] += bool(draft.ahead.token_ids)
            tree = DraftTree.chain(guess_of(key) or draft.ahead.token_ids, DraftOrigin.POOL)
            rounds.append((request, tree, ASK))
        self.client.announce(rounds)
        for request, tree, _ in rounds:
            text, at = self.truth[f"r{request.session_id}"], len(request.token_ids)
            accepted = 0
            while accepted < len(tree) and tree.token_ids[accepted] == text[at + accepted]:
                accepted += 1
            self.lengths[request.session_id] += accepted + 1
        return True

    def half_wrong(self, key: int) -> tuple[int, ...]:
        """One token as the text goes on, and another one that it does not."""
        right, next_one = self.truth[f"r{key}"][self.lengths[key] :][:2]
        return right, (next_one + 1) % VOCAB_SIZE

    # Frames; the first one of every stream in that direction.

    def to_drafter(self, *, is_repeated: bool = False) -> bool:
        moved = [_deliver(end._peer, is_repeated=is_repeated) for end in self.streams]
        self.let_draft()
        return any(moved)

    def to_target(self, *, is_repeated: bool = False) -> bool:
        moved = [_deliver(end, is_repeated=is_repeated) for end in self.streams]
        self.drafts([])
        return any(moved)

    def drafts(self, requests):
        """What the client has; a session of which nothing new arrived is what it was."""
        self.received.clear()
        sessions = dict(self.client._sessions)
        before = {key: _state(session) for key, session in sessions.items()}
        answers = self.client.drafts(requests)
        news = {
            (said.session, said.epoch)
            for frame in self.received
            for said in (*frame.tables, *frame.resyncs, *frame.drops)
        }
        for key, session in sessions.items():
            if (key, session.epoch) not in news:
                assert _state(session) == before[key], "a stale message was obeyed"
        return answers

    def ends(self, *, is_to_drafter: bool) -> list:
        return [end._peer if is_to_drafter else end for end in self.streams]

    def lose(self, *, is_to_drafter: bool) -> bool:
        losing = [end for end in self.ends(is_to_drafter=is_to_drafter) if end._under_way]
        for end in losing:
            heapq.heappop(end._under_way)
        return bool(losing)

    def overtake(self, *, is_to_drafter: bool) -> bool:
        """The first frame falls behind all others."""
        moving = [end for end in self.ends(is_to_drafter=is_to_drafter) if len(end._under_way) > 1]
        for end in moving:
            _, number, data = heapq.heappop(end._under_way)
            heapq.heappush(end._under_way, (3e9 + number, number + 20_000, data))
        return bool(moving)

    def cut(self, *, is_to_drafter: bool, share: float) -> bool:
        """Only a part of the first frame will arrive."""
        cutting = [end for end in self.ends(is_to_drafter=is_to_drafter) if end._under_way]
        for end in cutting:
            at, number, data = heapq.heappop(end._under_way)
            heapq.heappush(end._under_way, (at, number, data[: int(share * len(data))]))
        return bool(cutting)

    # The drafters.

    def start(self, endpoint: str) -> None:
        oracle = self.oracles[endpoint] = FailingOracle(self.truth)
        service = self.services[endpoint] = DraftService(
            oracle, vocab_size=VOCAB_SIZE, limits=LIMITS, clock=self.network.clock
        )
        self.network.listen(endpoint, IDENTITY, service.accept, 4_096)

    def kill(self, endpoint: str) -> None:
        self.network.kill(endpoint)
        self.let_draft()
        del self.services[endpoint], self.oracles[endpoint]

    def crash(self, endpoint: str) -> bool:
        """A drafter dies and another process takes its place."""
        self.kill(endpoint)
        self.start(endpoint)
        return True

    def swap(self, endpoint: str) -> None:
        """Another drafter takes over while its replica serves."""
        successor = FailingOracle(self.truth)
        successor.num_failures = self.oracles[endpoint].num_failures
        self.oracles[endpoint] = successor
        self.services[endpoint].replace_drafter(successor)
        self.let_draft()

    def evict(self, endpoint: str) -> bool:
        service = self.services[endpoint]
        for key, session in list(service._sessions.items()):
            service._drop(key, session.epoch, draft_pb2.Dropped.EVICTED)
            service._flush()
            return True
        return False

    def let_draft(self) -> None:
        for service in self.services.values():
            service.step()

    # What holds.

    def check(self) -> None:
        """What holds in every state; the oracles check the texts they are told."""
        texts: dict[str, int] = {f"r{key}": length for key, length in self.lengths.items()}
        for endpoint, service in self.services.items():
            oracle = self.oracles[endpoint]
            assert service.stats().num_drafter_failures == oracle.num_failures
            assert len(service._sessions) == oracle.num_open <= LIMITS.max_sessions
            for held in service._sessions.values():
                truth = self.truth[held.spec.request_id]
                assert held.token_ids == truth[: len(held.token_ids)]
                assert len(held.token_ids) <= texts.get(held.spec.request_id, TEXT_LEN)
        assert self.client.counters.num_malformed == 0
        for key, length in self.lengths.items():
            assert self.client._sessions[key].num_sent <= length

    def calm_down(self) -> None:
        """Lost frames stay lost, those under way arrive, nothing else happens any more.

        Raises:
            AssertionError: a session gets no tables all the same.
        """
        in_row = dict.fromkeys(self.lengths, 0)
        for _ in range(_CALM_STEPS):
            before = dict(self.num_hits)
            self.client.upkeep()
            self.step(self.lengths)
            for key in in_row:
                in_row[key] = in_row[key] + 1 if self.num_hits[key] > before[key] else 0
            if min(in_row.values(), default=3) >= 3:
                return
            self.deliver_all()
        raise AssertionError(f"no tables from a calm network; hits in a row: {in_row}")

    def deliver_all(self) -> None:
        while self.to_drafter():
            pass
        while self.to_target():
            pass


def _state(session):
    """Of a target's session, all but its tables."""
    state = dict(vars(session))
    del state["_tables"]
    return state | {"_asked": dict(session._asked)}


@cache
def _text(key: int) -> list[int]:
    return random_text(key, TEXT_LEN)


def _deliver(end, *, is_repeated: bool) -> bool:
    if not end._under_way:
        return False
    if is_repeated:
        _, number, data = end._under_way[0]
        heapq.heappush(end._under_way, (2e9 + number, number + 10_000, data))
    _, number, data = heapq.heappop(end._under_way)
    heapq.heappush(end._under_way, (0.0, number, data))
    return True
