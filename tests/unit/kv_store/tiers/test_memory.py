from kv_store.tiers.memory import MemoryTier
from tests.kv_pages import make_chain, make_layout

KEYS = make_chain(make_layout(), 5)


async def test_least_recently_used_leave_first():
    tier = MemoryTier(40)
    await tier.put_many([(key, bytes(10)) for key in KEYS[:4]])
    await tier.get_many(KEYS[:1])
    await tier.contains_many(KEYS[1:2])
    await tier.put_many([(KEYS[4], bytes(20))])
    assert await tier.contains_many(KEYS) == [True, False, False, True, True]
    assert tier.usage()[:2] == (3, 40)


async def test_what_can_never_fit_is_refused_and_evicts_nothing():
    tier = MemoryTier(40)
    assert await tier.put_many([(KEYS[0], bytes(40)), (KEYS[1], bytes(41))]) == [True, False]
    assert tier.usage()[:2] == (1, 40)


async def test_a_blob_evicted_by_its_own_batch_is_not_reported_as_held():
    tier = MemoryTier(20)
    assert await tier.put_many([(key, bytes(10)) for key in KEYS[:3]]) == [False, True, True]
