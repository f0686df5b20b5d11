import asyncio

from kv_store import TierUnavailableError
from kv_store.errors import TierBusyError
from kv_store.faults import FaultPlan, FaultyTier
from kv_store.tiers.breaker import CircuitBreaker
from kv_store.tiers.guarded import GuardedTier
from kv_store.tiers.memory import MemoryTier
from tests.kv_pages import make_chain, make_layout, wait_until

KEYS = make_chain(make_layout(), 3)
ITEMS = [(key, b"blob") for key in KEYS]


class GatedTier(MemoryTier):
    """Answers reads only while its gate is open."""

    def __init__(self):
        super().__init__(1 << 20)
        self.gate = asyncio.Event()
        self.num_asked = 0
        self.error: Exception | None = None

    async def get_many(self, keys):
        self.num_asked += 1
        await self.gate.wait()
        if self.error:
            raise self.error
        return await super().get_many(keys)

    async def contains_many(self, keys):
        await self.gate.wait()
        return await super().contains_many(keys)


def guard(tier, *, timeout_s=10.0, max_failures=2, max_inflight=16, clock=lambda: 0.0):
    return GuardedTier(
        tier,
        operation_timeout_s=timeout_s,
        make_breaker=lambda: CircuitBreaker(
            max_failures=max_failures, open_s=1.0, max_open_s=1.0, clock=clock
        ),
        max_inflight=max_inflight,
    )


async def test_failures_are_misses_and_open_the_breaker():
    guarded = guard(FaultyTier(MemoryTier(1 << 20), FaultPlan(fail=1.0)))
    for _ in range(4):
        assert await guarded.get(KEYS) == [None] * 3
    assert await guarded.contains(KEYS) == [False] * 3
    stats = guarded.stats()
    assert stats.num_errors == 2, "an open breaker asks no more"
    assert not stats.is_open


async def test_waits_behind_others_are_misses_that_leave_the_tier_in_service():
    tier = GatedTier()
    tier.gate.set()
    tier.error = TierBusyError("no time was left")
    guarded = guard(tier)
    for _ in range(4):
        assert await guarded.get(KEYS) == [None] * 3
    assert tier.num_asked == guarded.stats().num_errors == 4
    assert guarded.stats().is_open


async def test_writes_have_their_own_breaker():
    class Full(MemoryTier):
        async def put_many(self, items):
            raise TierUnavailableError("full")

    tier = Full(1 << 20)
    await MemoryTier.put_many(tier, ITEMS)
    guarded = guard(tier)
    for _ in range(3):
        assert await guarded.put(ITEMS) == [False] * 3
    assert not guarded.is_writable
    assert await guarded.get(KEYS) == [b"blob"] * 3
    assert guarded.stats().is_open


async def test_a_silent_tier_is_found_out_although_callers_are_less_patient():
    tier = GatedTier()
    guarded = guard(tier, timeout_s=0.05)
    for _ in range(2):
        assert await guarded.contains(KEYS, patience_s=0.001) == [False] * 3
    await asyncio.to_thread(wait_until, lambda: not guarded.stats().is_open)
    assert guarded.stats().num_errors == 2
    await guarded.aclose()


async def test_a_probe_brings_the_tier_back():
    now = [0.0]
    tier = GatedTier()
    tier.gate.set()
    tier.error = TierUnavailableError("down")
    guarded = guard(tier, clock=lambda: now[0])
    await guarded.put(ITEMS)
    for _ in range(2):
        await guarded.get(KEYS)
    tier.error = None
    assert await guarded.get(KEYS) == [None] * 3
    now[0] = 2.0
    assert await guarded.get(KEYS) == [b"blob"] * 3
    assert guarded.stats().is_open


async def test_operations_under_way_are_bounded():
    tier = GatedTier()
    guarded = guard(tier, max_inflight=2)
    calls = [asyncio.create_task(guarded.get(KEYS)) for _ in range(5)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert tier.num_asked == 2
    tier.gate.set()
    await asyncio.gather(*calls)
    assert tier.num_asked == 5


async def test_refused_operations_take_no_place():
    guarded = guard(FaultyTier(MemoryTier(1), FaultPlan(fail=1.0)), max_failures=1, max_inflight=2)
    async with asyncio.timeout(60):
        for _ in range(5):
            assert await guarded.get(KEYS) == [None] * 3


async def test_a_bug_in_a_tier_is_a_counted_miss_and_told_once(caplog):
    tier = GatedTier()
    tier.gate.set()
    tier.error = KeyError("a bug")
    guarded = guard(tier)
    for _ in range(2):
        assert await guarded.get(KEYS) == [None] * 3
    stats = guarded.stats()
    assert stats.num_errors == 2
    assert not stats.is_open
    assert len([record for record in caplog.records if record.exc_info]) == 1


async def test_a_bug_while_a_namespace_is_dropped_is_none_dropped():
    class Buggy(MemoryTier):
        async def delete_namespace(self, namespace_id):
            raise KeyError("a bug")

    guarded = guard(Buggy(1 << 20))
    assert await guarded.drop_namespace(KEYS[0].namespace_id) == 0
    assert guarded.stats().num_errors == 1


async def test_corrupt_pages_are_counted_as_misses_and_deleted():
    guarded = guard(MemoryTier(1 << 20))
    await guarded.put(ITEMS)
    await guarded.discard_corrupt(KEYS[1])
    assert await guarded.get(KEYS) == [b"blob", None, b"blob"]
    stats = guarded.stats()
    assert (stats.num_corrupt, stats.num_misses, stats.num_puts) == (1, 1, 3)
    assert (stats.num_pages, stats.num_bytes) == (2, 8)
