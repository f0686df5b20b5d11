"""The protocol under delay, loss, repetition, reordering, truncation, kills and restarts.

The texts are known beforehand and the drafter is an oracle of them, so every wrong step shows: the
drafter checks that its view is a prefix of the text, the target that each draft continues it.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.speculation.draft_service import DraftLimits, DraftService
from deployments.engine.speculation.fake_transport import FakeNetwork, Faults
from deployments.engine.speculation.pool_client import PoolClient
from deployments.engine.speculation.pool_link import LinkLimits
from deployments.engine.speculation.speculator import DraftRequest
from deployments.engine.speculation.types import Ask, DraftOrigin, DraftTree
from tests.fakes_speculation import IDENTITY, VOCAB_SIZE, OracleDrafter, random_text, spec_of

ENDPOINTS = ("one:1", "two:2")
ASK = Ask(4, 2)
STEP_S = 0.02
TEXT_LEN = 5_000
TROUBLES = Faults(
    min_delay_s=0.001,
    max_delay_s=0.05,
    drop=0.1,
    duplicate=0.1,
    reorder=0.1,
    truncate=0.05,
    kill=0.01,
)


class World:
    """Two draft replicas, one target, some sessions."""

    def __init__(self, seed: int, faults: Faults, limits: DraftLimits | None = None) -> None:
        self.rng = random.Random(seed)  # noqa: S311
        self.network = FakeNetwork(seed, faults, capacity=16)
        self.truth: dict[str, list[int]] = {}
        self.limits = limits or DraftLimits(max_sessions=6, max_session_tokens=10 * TEXT_LEN)
        self.services: dict[str, DraftService] = {}
        self.oracles: dict[str, OracleDrafter] = {}
        for endpoint in ENDPOINTS:
            self.start(endpoint)
        self.client = PoolClient(
            self.network.connector(IDENTITY),
            vocab_size=VOCAB_SIZE,
            prompt_ask=ASK,
            limits=LinkLimits(max_backoff_s=1.0, max_frame_tokens=40, idle_close_s=1.0),
            clock=self.network.clock,
            rng=random.Random(seed + 1),  # noqa: S311
        )
        self.lengths: dict[int, int] = {}
        self.num_hits: dict[int, int] = {}
        self.num_opened = 0

    def start(self, endpoint: str) -> None:
        oracle = self.oracles[endpoint] = OracleDrafter(self.truth)
        service = self.services[endpoint] = DraftService(
            oracle, vocab_size=VOCAB_SIZE, limits=self.limits, clock=self.network.clock
        )
        self.network.listen(endpoint, IDENTITY, service.accept, self.limits.max_session_tokens)

    def kill(self, endpoint: str) -> None:
        self.network.kill(endpoint)

    def open(self, *, is_attached: bool = True) -> int:
        self.num_opened += 1
        session_id = self.num_opened
        spec = spec_of(session_id, random_text(session_id, self.rng.choice([3, 30, 150])))
        self.truth[spec.request_id] = [
            *spec.token_ids,
            *random_text(10_000 + session_id, TEXT_LEN),
        ]
        self.lengths[session_id] = len(spec.token_ids)
        self.num_hits[session_id] = 0
        if is_attached and self.rng.random() < 0.5:
            self.attach(session_id)
            self.client.open(spec)
        else:
            self.client.open(spec)
            if is_attached:
                self.attach(session_id)
        return session_id

    def attach(self, session_id: int) -> None:
        self.client.attach(f"r{session_id}", self.rng.choice(ENDPOINTS))

    def close(self, session_id: int) -> None:
        del self.lengths[session_id]
        self.client.close(session_id)

    def step(self) -> None:
        """One engine step, with whatever the network did meanwhile."""
        chosen = [key for key in self.lengths if self.rng.random() < 0.9]
        requests = [
            DraftRequest(
                session_id=key,
                token_ids=self.truth[f"r{key}"][: self.lengths[key]],
                max_draft_tokens=8,
            )
            for key in chosen
        ]
        rounds = []
        for request, draft in zip(requests, self.client.drafts(requests), strict=True):
            text = self.truth[f"r{request.session_id}"]
            at = len(request.token_ids)
            expected = tuple(text[at : at + len(draft.ahead.token_ids)])
            assert draft.ahead.token_ids == expected, "a row that disagrees with the text"
            self.num_hits[request.session_id] += bool(draft.ahead.token_ids)
            tree = self.tree(text, at, draft.ahead.token_ids)
            rounds.append((request, tree, ASK))
        self.client.announce(rounds)
        for request, tree, _ in rounds:
            text, at = self.truth[f"r{request.session_id}"], len(request.token_ids)
            accepted = 0
            while accepted < len(tree) and tree.token_ids[accepted] == text[at + accepted]:
                accepted += 1
            self.lengths[request.session_id] += accepted + 1
        self.network.advance(STEP_S / 2)
        for endpoint, service in self.services.items():
            if self.rng.random() < 0.9:
                service.step()
            assert service.stats().num_drafter_failures == 0
            assert service.stats().num_sessions <= self.limits.max_sessions
            assert service.stats().num_sessions == self.oracles[endpoint].num_open
        if self.rng.random() < 0.5:
            self.client.upkeep()
        self.network.advance(STEP_S / 2)

    def tree(self, text: list[int], at: int, draft: tuple[int, ...]) -> DraftTree:
        if draft:
            return DraftTree.chain(draft[:4], DraftOrigin.POOL)
        guess = [
            token if self.rng.random() < 0.7 else self.rng.randrange(VOCAB_SIZE)
            for token in text[at : at + self.rng.randrange(4)]
        ]
        return DraftTree.chain(guess, DraftOrigin.LOCAL)

    def heal(self) -> None:
        self.network.faults = Faults(min_delay_s=0.001, max_delay_s=0.002)
        for endpoint in ENDPOINTS:
            if endpoint not in self.network._listeners:
                self.start(endpoint)


def live_through(world: World, num_steps: int) -> None:
    for _ in range(num_steps):
        dice = world.rng.random()
        if dice < 0.05 and len(world.lengths) < 5:
            world.open()
        elif dice < 0.08 and world.lengths:
            world.close(world.rng.choice(list(world.lengths)))
        elif dice < 0.11 and world.lengths:
            world.attach(world.rng.choice(list(world.lengths)))
        elif dice < 0.12 and world.lengths:
            world.client.detach(f"r{world.rng.choice(list(world.lengths))}")
        elif dice < 0.13:
            world.kill(world.rng.choice(ENDPOINTS))
        elif dice < 0.16:
            endpoint = world.rng.choice(ENDPOINTS)
            if endpoint not in world.network._listeners:
                world.start(endpoint)
        world.step()


def assert_tables_flow(world: World) -> None:
    for key in list(world.lengths):
        world.attach(key)
    world.open()
    # The longest hold is 64 rounds, and a session takes part in nine of ten.
    for _ in range(120):
        world.step()
        world.client.upkeep()
    before = dict(world.num_hits)
    # About two of three rounds hit, by the chances of ``World.step``.
    for _ in range(60):
        world.step()
    for key in world.lengths:
        assert world.num_hits[key] - before[key] > 20, f"session {key} gets no tables"


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_everything_at_once(seed):
    world = World(seed, TROUBLES)
    for _ in range(3):
        world.open()
    live_through(world, 150)
    world.heal()
    assert_tables_flow(world)


@pytest.mark.parametrize("fault", ["drop", "duplicate", "reorder", "truncate", "kill"])
def test_one_kind_of_trouble(fault):
    for seed in range(5):
        world = World(seed, Faults(min_delay_s=0.001, max_delay_s=0.03, **{fault: 0.3}))
        for _ in range(3):
            world.open()
        for _ in range(80):
            world.step()
            world.client.upkeep()
        world.heal()
        assert_tables_flow(world)


def test_a_calm_network_serves_from_the_first_round():
    world = World(1, Faults(min_delay_s=0.001, max_delay_s=0.002))
    world.rng = _AlwaysSmall(1)
    key = world.open()
    for _ in range(6):
        world.client.upkeep()
        world.network.advance(0.01)
        for service in world.services.values():
            service.step()
    for _ in range(40):
        world.step()
    assert world.num_hits[key] >= 38
    counters = world.client.counters
    assert counters.num_resyncs == counters.num_malformed == counters.num_sessions_dropped == 0
    assert 0 < counters.round_trip_p50_s < 2 * STEP_S


class _AlwaysSmall(random.Random):
    """Takes every chance of ``World``: all sessions in every step, every service steps."""

    def random(self) -> float:
        return 0.0


def test_a_closed_link_is_given_up_after_a_while():
    world = World(2, Faults())
    key = world.open()
    for _ in range(10):
        world.client.upkeep()
        world.step()
    assert sum(service.stats().num_streams for service in world.services.values()) == 1
    world.close(key)
    for _ in range(200):
        world.client.upkeep()
        world.step()
    assert sum(service.stats().num_streams for service in world.services.values()) == 0
    assert world.client._links == {}
    assert sum(oracle.num_open for oracle in world.oracles.values()) == 0


def test_the_same_seed_gives_the_same_run():
    def run() -> tuple[dict[int, int], dict[int, int]]:
        world = World(11, TROUBLES)
        world.open()
        live_through(world, 60)
        return world.lengths, world.num_hits

    assert run() == run()
