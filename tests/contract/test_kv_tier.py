"""What every tier promises, alone and behind a tier that misbehaves."""

import asyncio
import secrets
from contextlib import suppress

import pytest

from kv_store import TierUnavailableError
from kv_store.faults import FaultPlan, FaultyTier
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.memory import MemoryTier
from kv_store.tiers.sealed import SealedTier
from kv_store.tiers.ssd import SsdTier
from kv_store.tiers.valkey import ValkeyTier
from kv_store.tiers.valkey_topology import ValkeyAddress
from tests.kv_pages import make_chain, make_layout

KEYS = make_chain(make_layout(), 16)
BLOBS = [bytes([index]) * (1 + 700 * index) for index in range(16)]
ITEMS = list(zip(KEYS, BLOBS, strict=True))

TIERS = ["memory", "ssd", pytest.param("valkey", marks=pytest.mark.integration)]

# The seeds make each kind of fault happen at least once within a test.
FAULTS = {
    "none": FaultPlan(),
    "fail": FaultPlan(seed=1, fail=0.4),
    "delay": FaultPlan(seed=2, delay=0.5, delay_s=0.001),
    "drop": FaultPlan(seed=3, drop=0.4),
    "corrupt": FaultPlan(seed=4, corrupt=0.4),
    "truncate": FaultPlan(seed=5, truncate=0.4),
}


@pytest.fixture(scope="module")
def server():
    server = EmbeddedValkey(64 << 20)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=TIERS)
async def tier(request, tmp_path):
    if request.param == "memory":
        tier = MemoryTier(1 << 23)
    elif request.param == "ssd":
        tier = SsdTier(
            tmp_path / "pages", budget_bytes=1 << 23, segment_bytes=1 << 22, num_read_threads=2
        )
    else:
        tier = ValkeyTier(
            ValkeyAddress(url=request.getfixturevalue("server").url),
            ttl_s=60.0,
            ttl_head_boost=1.0,
            connect_timeout_s=5.0,
            operation_timeout_s=5.0,
            max_connections=2,
        )
        await tier.delete_many(KEYS)
    yield tier
    await tier.aclose()


@pytest.fixture(params=["alone", "behind a faultless FaultyTier", "sealed"])
def any_tier(request, tier):
    if request.param == "sealed":
        # The server outlives the test, and sealed pages have names that its cleaning cannot know.
        return SealedTier(tier, secrets.token_bytes(32))
    return tier if request.param == "alone" else FaultyTier(tier, FaultPlan())


async def test_an_empty_tier_misses(any_tier):
    assert await any_tier.contains_many(KEYS) == [False] * 16
    assert await any_tier.get_many(KEYS) == [None] * 16
    assert await any_tier.delete_many(KEYS) == 0


async def test_gives_back_what_was_put_in_the_order_asked(any_tier):
    assert await any_tier.put_many(ITEMS[:8]) == [True] * 8
    asked = [3, 12, 0, 7, 3]
    assert await any_tier.contains_many([KEYS[i] for i in asked]) == [i < 8 for i in asked]
    blobs = await any_tier.get_many([KEYS[i] for i in asked])
    assert blobs == [BLOBS[i] if i < 8 else None for i in asked]


async def test_takes_and_gives_any_bytes(any_tier):
    raw = bytes(range(256)) * 4099
    await any_tier.put_many([(KEYS[0], memoryview(raw)), (KEYS[1], memoryview(raw)[1:-1])])
    assert await any_tier.get_many(KEYS[:2]) == [raw, raw[1:-1]]


async def test_a_second_put_changes_nothing(any_tier):
    await any_tier.put_many([(KEYS[0], b"first")])
    assert await any_tier.put_many([(KEYS[0], b"second"), (KEYS[1], b"new")]) == [True, True]
    assert await any_tier.get_many(KEYS[:2]) == [b"first", b"new"]


async def test_deleted_keys_are_gone_and_can_be_put_again(any_tier):
    await any_tier.put_many(ITEMS[:3])
    assert await any_tier.delete_many([KEYS[1], KEYS[9]]) == 1
    assert await any_tier.contains_many(KEYS[:3]) == [True, False, True]
    assert await any_tier.get_many(KEYS[:3]) == [BLOBS[0], None, BLOBS[2]]
    await any_tier.put_many([(KEYS[1], b"again")])
    assert await any_tier.get_many(KEYS[1:2]) == [b"again"]


async def test_the_same_page_hash_in_another_namespace_is_another_page(any_tier):
    other = KEYS[0]._replace(namespace_id=bytes(16))
    await any_tier.put_many([(KEYS[0], b"ours")])
    assert await any_tier.get_many([other]) == [None]


async def test_a_namespace_is_forgotten_as_a_whole_and_alone(any_tier):
    other = [key._replace(namespace_id=secrets.token_bytes(16)) for key in KEYS[:2]]
    large = secrets.token_bytes(3 << 20)  # a server holds it in parts
    await any_tier.put_many([*ITEMS[:3], (KEYS[3], large), (other[0], b"other")])
    assert await any_tier.delete_namespace(KEYS[0].namespace_id) == 4
    assert await any_tier.contains_many([*KEYS[:4], *other]) == [False] * 4 + [True, False]
    assert await any_tier.delete_namespace(KEYS[0].namespace_id) == 0
    assert await any_tier.put_many([(KEYS[3], b"again")]) == [True]
    assert await any_tier.get_many(KEYS[3:4]) == [b"again"]


async def test_empty_batches(any_tier):
    assert await any_tier.contains_many([]) == []
    assert await any_tier.get_many([]) == []
    assert await any_tier.put_many([]) == []
    assert await any_tier.delete_many([]) == 0


async def test_concurrent_operations_do_not_mix(any_tier):
    async def work(key, blob):
        await any_tier.put_many([(key, blob)])
        assert await any_tier.get_many([key]) == [blob]

    await asyncio.gather(*(work(key, blob) for key, blob in ITEMS))


async def test_usage_counts_or_says_unknown(any_tier):
    await any_tier.put_many(ITEMS[:4])
    num_pages, num_bytes, num_served = any_tier.usage()
    assert num_served == 0
    assert num_pages in (-1, 4)
    assert num_bytes == -1 or num_bytes >= sum(map(len, BLOBS[:4]))


async def test_a_closed_tier_is_unavailable(any_tier):
    await any_tier.put_many(ITEMS[:1])
    await any_tier.aclose()
    await any_tier.aclose()
    for operation in (any_tier.contains_many, any_tier.get_many, any_tier.delete_many):
        with pytest.raises(TierUnavailableError):
            await operation(KEYS)
    with pytest.raises(TierUnavailableError):
        await any_tier.put_many(ITEMS)
    with pytest.raises(TierUnavailableError):
        await any_tier.delete_namespace(KEYS[0].namespace_id)


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "none"])
async def test_a_faulty_tier_keeps_the_shape_of_answers_and_shows_its_fault(tier, fault):
    faulty = FaultyTier(tier, FAULTS[fault])
    num_failed = 0
    with suppress(TierUnavailableError):
        await faulty.put_many(ITEMS)
    await tier.put_many(ITEMS[:8])  # enough to read, whatever was lost
    seen = []
    for _ in range(8):
        try:
            assert len(await faulty.contains_many(KEYS)) == 16
            blobs = await faulty.get_many(KEYS)
        except TierUnavailableError:
            num_failed += 1
            continue
        assert len(blobs) == 16
        seen.extend(zip(blobs, BLOBS, strict=True))
    lost = [blob for blob, wanted in seen[:8] if blob is None]
    shorter = [blob for blob, wanted in seen if blob is not None and len(blob) < len(wanted)]
    changed = [
        blob
        for blob, wanted in seen
        if blob is not None and len(blob) == len(wanted) and blob != wanted
    ]
    assert bool(num_failed) == (fault == "fail")
    assert bool(shorter) == (fault == "truncate")
    assert bool(changed) == (fault == "corrupt")
    assert not lost or fault == "drop"
    assert fault != "drop" or any(blob is None for blob, _ in seen)


async def test_a_swapped_read_is_another_page(tier):
    faulty = FaultyTier(tier, FaultPlan(seed=6, swap=0.4))
    await faulty.put_many(ITEMS)
    blobs = await faulty.get_many(KEYS)
    wrong = [blob for blob, wanted in zip(blobs, BLOBS, strict=True) if blob != wanted]
    assert 0 < len(wrong) < 16
    assert set(map(bytes, wrong)) <= set(BLOBS)


async def test_a_duplicate_stays_under_the_wrong_key(tier):
    faulty = FaultyTier(tier, FaultPlan(seed=7, duplicate=0.4))
    await faulty.put_many(ITEMS)
    blobs = await tier.get_many(KEYS)
    wrong = [blob for blob, wanted in zip(blobs, BLOBS, strict=True) if blob != wanted]
    assert wrong
    assert set(map(bytes, wrong)) <= set(BLOBS)


async def test_a_lie_is_about_either_kind_of_key(tier):
    faulty = FaultyTier(tier, FaultPlan(seed=8, lie=0.4))
    await faulty.put_many(ITEMS[:8])
    held = await faulty.contains_many(KEYS)
    assert set(held[:8]) == set(held[8:]) == {False, True}
    assert await faulty.get_many(KEYS) == [*BLOBS[:8], *[None] * 8]


async def test_a_full_tier_keeps_a_part_and_says_so(tier):
    faulty = FaultyTier(tier, FaultPlan(seed=9, full=1.0))
    with pytest.raises(TierUnavailableError):
        await faulty.put_many(ITEMS)
    assert 0 < (await faulty.contains_many(KEYS)).count(True) < 16


async def test_a_read_only_tier_changes_nothing_and_still_gives(tier):
    await tier.put_many(ITEMS[:1])
    faulty = FaultyTier(tier, FaultPlan(seed=10, read_only=1.0))
    with pytest.raises(TierUnavailableError):
        await faulty.put_many(ITEMS)
    with pytest.raises(TierUnavailableError):
        await faulty.delete_many(KEYS)
    assert await faulty.get_many(KEYS[:2]) == [BLOBS[0], None]


async def test_faults_are_the_same_in_every_run():
    async def run():
        faulty = FaultyTier(MemoryTier(1 << 20), FaultPlan(seed=9, drop=0.3, corrupt=0.3))
        await faulty.put_many(ITEMS)
        return [await faulty.get_many(KEYS) for _ in range(3)]

    assert await run() == await run()
