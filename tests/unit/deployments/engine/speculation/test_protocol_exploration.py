"""Every order of events, up to a depth: what one target, one drafter and their stream can get into.

States are reached by replaying the events that lead there, and told apart by what their parts
remember. In every state the drafter's text is a prefix of the target's, a draft continues the text,
and the same sessions are open on all sides of the drafter. From every state tables flow again once
the network is calm.
"""

from __future__ import annotations

import heapq
import random
from collections import deque

import pytest

from deployments.engine.speculation.draft_service import DraftLimits, DraftService
from deployments.engine.speculation.fake_transport import FakeNetwork, Faults
from deployments.engine.speculation.pool_client import PoolClient
from deployments.engine.speculation.pool_link import LinkLimits
from deployments.engine.speculation.speculator import DraftRequest
from deployments.engine.speculation.types import Ask, DraftOrigin, DraftTree
from protos import draft_pb2
from tests.fakes_speculation import IDENTITY, VOCAB_SIZE, OracleDrafter, random_text, spec_of

ENDPOINTS = ("one:1", "two:2")
NEVER = Faults(min_delay_s=1e9, max_delay_s=1e9)
ASK = Ask(2, 1)
TEXT = random_text(1, 4_000)
PROMPT_LEN = 5
DEPTH = 4
DEEP = 40
NUM_WALKS = 150
CALM_STEPS = 100
"""More than the longest hold of a session and the longest pause of an ask."""


class Explored:
    """A target's end and two drafters; a frame moves only when it is told to."""

    def __init__(self) -> None:
        self.network = FakeNetwork(0, NEVER)
        self.truth = {"r1": TEXT}
        self.services: dict[str, DraftService] = {}
        self.oracles: dict[str, OracleDrafter] = {}
        for endpoint in ENDPOINTS:
            self.start(endpoint)
        self.streams = []
        self.client = PoolClient(
            self.connect,
            vocab_size=VOCAB_SIZE,
            prompt_ask=ASK,
            # A frame of four tokens: the prompt already needs two.
            limits=LinkLimits(backoff_s=0.0, max_backoff_s=0.0, max_frame_tokens=4),
            clock=self.network.clock,
            rng=random.Random(0),  # noqa: S311
        )
        self.length, self.num_hits = PROMPT_LEN, 0
        self.endpoint = ENDPOINTS[0]
        self.client.open(spec_of(1, self.truth["r1"][:PROMPT_LEN]))
        self.client.attach("r1", self.endpoint)
        self.client.upkeep()

    def start(self, endpoint):
        oracle = self.oracles[endpoint] = OracleDrafter(self.truth)
        service = self.services[endpoint] = DraftService(
            oracle, vocab_size=VOCAB_SIZE, limits=DraftLimits(), clock=self.network.clock
        )
        self.network.listen(endpoint, IDENTITY, service.accept, 4_096)

    def connect(self, endpoint):
        """Handshakes take no time; what follows waits for an event."""
        self.network.faults = Faults()
        target_end = self.network.connector(IDENTITY)(endpoint)
        self.network.faults = NEVER
        self.streams = [*(end for end in self.streams if end.is_alive), target_end]
        return target_end

    # Events. Each returns False where it would change nothing.

    def step(self, guess=()):
        """The engine verifies what the pool proposes, or a guess, behind the committed text."""
        text, at = self.truth["r1"], self.length
        request = DraftRequest(session_id=1, token_ids=text[:at], max_draft_tokens=4)
        (draft,) = self.client.drafts([request])
        assert draft.token_ids == tuple(text[at : at + len(draft.token_ids)])
        self.num_hits += bool(draft.token_ids)
        tree = DraftTree.chain(guess or draft.token_ids, DraftOrigin.POOL)
        self.client.announce([(request, tree, ASK)])
        num_accepted = 0
        while num_accepted < len(tree) and tree.token_ids[num_accepted] == text[at + num_accepted]:
            num_accepted += 1
        self.length += num_accepted + 1
        return True

    def step_half_wrong(self):
        right = self.truth["r1"][self.length]
        wrong = (self.truth["r1"][self.length + 1] + 1) % VOCAB_SIZE
        return self.step((right, wrong))

    def upkeep(self):
        before = self.fingerprint()
        self.client.upkeep()
        return self.fingerprint() != before

    def deliver(self, end, *, is_repeated=False):
        if not end._under_way:
            return False
        if is_repeated:
            _, number, data = end._under_way[0]
            heapq.heappush(end._under_way, (2e9 + number, number + 10_000, data))
        _, number, data = heapq.heappop(end._under_way)
        heapq.heappush(end._under_way, (0.0, number, data))
        return True

    def to_drafter(self, *, is_repeated=False):
        moved = [self.deliver(end._peer, is_repeated=is_repeated) for end in self.streams]
        for service in self.services.values():
            service.step()
        return any(moved)

    def to_drafter_twice(self):
        return self.to_drafter(is_repeated=True)

    def to_target(self):
        moved = [self.deliver(end) for end in self.streams]
        self.client.drafts([])
        return any(moved)

    def lose_to_drafter(self):
        return sum(self.lose(end._peer) for end in self.streams) > 0

    def lose_to_target(self):
        return sum(self.lose(end) for end in self.streams) > 0

    def lose(self, end):
        return bool(end._under_way) and bool(heapq.heappop(end._under_way))

    def overtake_to_drafter(self):
        return sum(self.overtake(end._peer) for end in self.streams) > 0

    def overtake_to_target(self):
        return sum(self.overtake(end) for end in self.streams) > 0

    def overtake(self, end):
        """The first frame falls behind all others."""
        if len(end._under_way) < 2:
            return False
        _, number, data = heapq.heappop(end._under_way)
        heapq.heappush(end._under_way, (3e9 + number, number + 20_000, data))
        return True

    def crash(self):
        """A drafter dies and another process takes its place."""
        self.network.kill(self.endpoint)
        for service in self.services.values():
            service.step()
        self.start(self.endpoint)
        return True

    def evict(self):
        service = self.services[self.endpoint]
        for key, session in list(service._sessions.items()):
            service._drop(key, session.epoch, draft_pb2.Dropped.EVICTED)
            service._flush()
            return True
        return False

    def move(self):
        self.endpoint = ENDPOINTS[self.endpoint == ENDPOINTS[0]]
        self.client.attach("r1", self.endpoint)
        return True

    EVENTS = (
        step,
        step_half_wrong,
        upkeep,
        to_drafter,
        to_drafter_twice,
        to_target,
        lose_to_drafter,
        lose_to_target,
        overtake_to_drafter,
        overtake_to_target,
        crash,
        evict,
        move,
    )

    def fingerprint(self):
        """All that later events depend on."""
        session = self.client._sessions[1]
        drafters = [
            sorted(
                (key, held.epoch, len(held.token_ids), held._round, held.question is None)
                for key, held in service._sessions.items()
            )
            for service in self.services.values()
        ]
        links = [
            (endpoint, link.state, bool(link._closes), vars_of(link._pace))
            for endpoint, link in self.client._links.items()
        ]
        wires = [
            tuple(data for _, _, data in sorted(end._under_way))
            for stream in self.streams
            for end in (stream, stream._peer)
        ]
        return repr(
            (
                self.length,
                self.endpoint,
                vars_of(session),
                list(self.client._commands),
                drafters,
                links,
                wires,
            )
        )

    @classmethod
    def served(cls):
        """A session that its drafter serves, with a table at hand and another asked for."""
        world = cls()
        world.calm_down()
        return world

    def check(self):
        """What holds in every state; the oracles check the texts they are told."""
        for endpoint, service in self.services.items():
            assert service.stats().num_drafter_failures == 0
            assert len(service._sessions) == self.oracles[endpoint].num_open
            for held in service._sessions.values():
                assert held.token_ids == self.truth["r1"][: len(held.token_ids)]
                assert len(held.token_ids) <= self.length
        assert self.client.counters.num_malformed == 0
        session = self.client._sessions[1]
        assert session.num_sent <= self.length

    def calm_down(self):
        """Lost frames stay lost, those under way arrive, nothing else happens any more."""
        num_in_row = 0
        for _ in range(CALM_STEPS):
            before = self.num_hits
            self.client.upkeep()
            self.step()
            num_in_row = num_in_row + 1 if self.num_hits > before else 0
            if num_in_row == 3:
                return
            while self.to_drafter():
                pass
            while self.to_target():
                pass
        pytest.fail("no tables from a calm network")


def vars_of(thing):
    slots = getattr(type(thing), "__slots__", None)
    found = {name: getattr(thing, name) for name in slots} if slots else dict(vars(thing))
    found.pop("spec", None)
    return {
        name: vars_of(value) if type(value).__module__.startswith("deployments") else value
        for name, value in found.items()
    }


def reached_by(begin, path):
    world = begin()
    has_changed = True
    for event in path:
        has_changed = event(world)
        world.check()
    return world, has_changed


@pytest.mark.parametrize("begin", [Explored, Explored.served], ids=["unopened", "served"])
def test_every_order_of_few_events(begin):
    seen = {begin().fingerprint()}
    ahead = deque([()])
    while ahead:
        path = ahead.popleft()
        for event in Explored.EVENTS:
            world, has_changed = reached_by(begin, (*path, event))
            if not has_changed or (mark := world.fingerprint()) in seen:
                continue
            seen.add(mark)
            if len(path) + 1 < DEPTH:
                ahead.append((*path, event))
            world.calm_down()
    assert len(seen) > 300


def test_long_walks_end_in_tables():
    for seed in range(NUM_WALKS):
        rng = random.Random(seed)  # noqa: S311
        world, _ = reached_by(Explored, rng.choices(Explored.EVENTS, k=DEEP))
        world.calm_down()
