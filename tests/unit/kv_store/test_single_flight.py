import threading
from collections import OrderedDict
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest

from kv_store import KVStoreConfig, MemoryTierConfig, TierUnavailableError, build_page_store
from kv_store.config import SingleFlightConfig
from kv_store.single_flight import SingleFlight
from kv_store.tiers.breaker import CircuitBreaker
from kv_store.tiers.guarded import GuardedTier
from kv_store.tiers.memory import MemoryTier
from tests.kv_pages import make_chain, make_layout, make_page, wait_until

LAYOUT = make_layout()
KEYS = make_chain(LAYOUT, 6)
PAGES = [make_page(LAYOUT, seed) for seed in range(6)]
PATIENT_S = 20.0


class Room:
    """What several stores share: pages, claims, and the time."""

    def __init__(self):
        self.pages = OrderedDict()
        self.claims = {}
        self.now = 0.0
        self.lock = threading.Lock()


class SharedTier(MemoryTier):
    """One store's view of a room."""

    is_shared = True

    def __init__(self, room):
        super().__init__(1 << 20)
        self._blobs = room.pages
        self.room = room
        self.is_broken = False
        self.num_claims = 0

    async def claim_many(self, keys, duration_s):
        if self.is_broken:
            raise TierUnavailableError("gone")
        self.num_claims += len(keys)
        claimed = []
        with self.room.lock:
            for key in keys:
                owner, until = self.room.claims.get(key, (None, 0.0))
                is_ours = owner in (None, self) or until <= self.room.now
                if is_ours:
                    self.room.claims[key] = self, self.room.now + duration_s
                claimed.append(is_ours)
        return claimed


def make_flight(tier, on_sleep=lambda: None, **config):
    guarded = GuardedTier(
        tier,
        operation_timeout_s=PATIENT_S,
        make_breaker=lambda: CircuitBreaker(max_failures=3, open_s=1, max_open_s=1),
    )

    async def sleep(seconds):
        tier.room.now += seconds
        on_sleep()

    return SingleFlight(
        guarded,
        SingleFlightConfig(wait_s=0.5, poll_s=0.125, min_pages=2, claim_s=config.pop("claim_s", 9)),
        clock=lambda: tier.room.now,
        sleep=sleep,
    )


async def test_the_first_computes_and_the_second_takes_what_was_written():
    room = Room()
    first, second = SharedTier(room), SharedTier(room)

    def write():
        if room.now >= 0.25:
            room.pages[KEYS[0]] = b"page"

    leader, follower = make_flight(first), make_flight(second, write)
    assert not await leader.wait_for_first(KEYS, leader.gives_up_at(10))
    assert not await leader.wait_for_first(KEYS, leader.gives_up_at(10)), "it waits for nobody"
    assert await follower.wait_for_first(KEYS, follower.gives_up_at(10))
    assert room.now == 0.25
    assert (leader.num_joined, leader.num_in_vain) == (0, 0)
    assert (follower.num_joined, follower.num_in_vain) == (1, 0)


async def test_a_wait_is_bounded_by_its_own_limit_and_by_half_of_the_load():
    room = Room()
    leader, follower = make_flight(SharedTier(room)), make_flight(SharedTier(room))
    await leader.wait_for_first(KEYS, 10)
    assert not await follower.wait_for_first(KEYS, follower.gives_up_at(10))
    assert room.now == 0.5
    assert not await follower.wait_for_first(KEYS, follower.gives_up_at(1.0))
    assert room.now == 0.75
    assert follower.num_in_vain == 2


async def test_a_dead_holder_costs_its_claim_and_one_of_those_who_wait_takes_over():
    room = Room()
    dead, heir, third = (make_flight(SharedTier(room), claim_s=0.25) for _ in range(3))
    await dead.wait_for_first(KEYS, 10)
    assert not await heir.wait_for_first(KEYS, heir.gives_up_at(10))
    assert room.now == 0.25
    assert {owner for owner, _ in room.claims.values()} == {heir._tier._tier}
    assert not await third.wait_for_first(KEYS, room.now), "no time left"
    assert third.num_in_vain == 1


async def test_a_tier_that_fails_is_not_waited_for():
    tier = SharedTier(Room())
    tier.is_broken = True
    flight = make_flight(tier)
    assert not await flight.wait_for_first(KEYS, 10)
    assert tier.room.now == 0


async def test_few_pages_are_computed_at_once():
    tier = SharedTier(Room())
    assert not await make_flight(tier).wait_for_first(KEYS[:1], 10)
    assert tier.num_claims == 0


@contextmanager
def stores(count, **flight):
    room = Room()
    config = KVStoreConfig(
        tiers=(MemoryTierConfig(),), single_flight={"poll_s": 0.001, "wait_s": PATIENT_S} | flight
    )
    with ExitStack() as opened:
        yield [
            opened.enter_context(closing_store(build_page_store(config, LAYOUT, wrap_tier=tier)))
            for tier in [lambda _: SharedTier(room)] * count
        ]


@contextmanager
def closing_store(store):
    try:
        yield store
    finally:
        store.close()


@pytest.mark.parametrize("is_dead", [False, True])
def test_of_many_stores_that_miss_a_chain_one_computes_it(is_dead):
    num_computed = [0]
    lock = threading.Lock()
    # A thread may begin so late that few pages are missing: that must not be too few to wait for.
    with stores(4, claim_s=PATIENT_S, min_pages=1) as opened:
        if is_dead:  # it writes one page and is heard of no more
            dead = opened.pop()
            assert dead.load(KEYS, timeout_s=PATIENT_S).result().pages == ()
            dead.save(KEYS[0], PAGES[0].copy())
            assert dead.flush(PATIENT_S)

        def serve(store):
            pages = store.load(KEYS, timeout_s=4.0 if is_dead else 4 * PATIENT_S).result().pages
            for index, page in enumerate(pages):
                assert np.array_equal(page, PAGES[index])
            for index in range(len(pages), 6):
                with lock:
                    num_computed[0] += 1
                store.save(KEYS[index], PAGES[index].copy())
                assert store.flush(PATIENT_S)

        threads = [threading.Thread(target=serve, args=(store,)) for store in opened]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if is_dead:
            assert 5 <= num_computed[0] <= 5 * 3
            assert sum(store.stats().num_flights_in_vain for store in opened) > 0
        else:
            assert num_computed[0] == 6
        assert all(len(s.load(KEYS, timeout_s=PATIENT_S).result().pages) == 6 for s in opened)
        wait_until(lambda: all(store.stats().num_queued == 0 for store in opened))
