"""Bytes of one tenant in a real server: what fits is written, the rest refused, room comes back."""

from contextlib import asynccontextmanager

import pytest
import redis

from kv_store import KVStoreConfig, ValkeyTierConfig, build_page_store
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.valkey import ValkeyTier
from kv_store.tiers.valkey_admin import stored_pages
from kv_store.tiers.valkey_batches import ValkeyBatches, page_name
from kv_store.tiers.valkey_quota import NewPage, TenantQuota, ledger_name
from kv_store.tiers.valkey_topology import ValkeyAddress
from tests.kv_pages import make_chain, make_layout, make_page
from tests.valkey_processes import ValkeyCluster

pytestmark = pytest.mark.integration

LAYOUT = make_layout()
KEYS = make_chain(LAYOUT, 40)
OTHERS = make_chain(LAYOUT, 4, "lossy:x")
SIZE = 1000
PATIENT_S = 30.0
TTL_S = 3600.0


@pytest.fixture(scope="module")
def running():
    server = EmbeddedValkey(64 << 20)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def admin(running):
    with redis.Redis.from_url(running.url) as client:
        client.flushall()
        yield client


@asynccontextmanager
async def tier(url, limit, **address):
    tier = ValkeyTier(
        ValkeyAddress(url=url, **address),
        ttl_s=TTL_S,
        ttl_head_boost=1.0,
        connect_timeout_s=5.0,
        operation_timeout_s=PATIENT_S,
        max_connections=2,
        tenant_quota_bytes=limit,
    )
    yield tier
    await tier.aclose()


async def put(tier, keys):
    return await tier.put_many([(key, bytes(SIZE)) for key in keys])


def total(admin, namespace=KEYS[0].namespace_id):
    return admin.zscore(ledger_name(namespace), "=")


async def test_beyond_the_quota_new_pages_are_refused_and_old_ones_stay(running, admin):
    async with tier(running.url, 5 * SIZE + 10) as ours, tier(running.url, 5 * SIZE + 10) as theirs:
        assert await put(ours, KEYS[:3]) == [True] * 3
        assert await put(theirs, KEYS[2:8]) == [True] * 3 + [False] * 3
        assert await ours.contains_many(KEYS[:8]) == [True] * 5 + [False] * 3
        assert await put(ours, KEYS[:5]) == [True] * 5, "they are there"
        assert await put(ours, OTHERS) == [True] * 4, "another tenant has room of its own"
        assert await ours.contains_many(KEYS[:5]) == [True] * 5
    assert (total(admin), total(admin, OTHERS[0].namespace_id)) == (5 * SIZE, 4 * SIZE)
    assert sum(page.num_bytes for page in stored_pages(admin).values()) == 9 * SIZE, (
        "ledgers are no pages"
    )


async def test_pages_that_the_server_has_lost_make_room(running, admin):
    now = 1000.0
    batches = ValkeyBatches(
        ValkeyAddress(url=running.url),
        connect_timeout_s=5.0,
        operation_timeout_s=PATIENT_S,
        max_connections=1,
    )
    quota = TenantQuota(batches, limit_bytes=30 * SIZE, ttl_s=TTL_S, clock=lambda: now)

    async def admit(keys):
        return await quota.admit([NewPage(key, SIZE) for key in keys])

    try:
        assert await admit(KEYS[:30]) == [True] * 30
        for key in KEYS[:10]:
            admin.set(page_name(key), b"still here")
        assert await admit(KEYS[30:31]) == [False]
        assert total(admin) == 30 * SIZE, "those just admitted may still be on their way"
        now += 60
        while total(admin) > 10 * SIZE:  # a share of them is looked for with every batch
            assert await admit(KEYS[:1]) == [True]
        assert await admit(KEYS[10:40]) == [True] * 20 + [False] * 10
        now += 2 * TTL_S  # all are due, and those that are read live on
        assert await admit(KEYS[:1]) == [True]
        assert total(admin) == 10 * SIZE
    finally:
        batches.close()


async def test_a_forgotten_namespace_has_all_its_room_again(running, admin):
    async with tier(running.url, 5 * SIZE) as ours:
        assert sum(await put(ours, KEYS[:8])) == 5
        assert await put(ours, OTHERS) == [True] * 4
        assert await ours.delete_namespace(KEYS[0].namespace_id) == 5, "a ledger is no page"
        assert (total(admin), total(admin, OTHERS[0].namespace_id)) == (None, 4 * SIZE)
        assert await put(ours, KEYS[8:14]) == [True] * 5 + [False]


def test_a_refusal_is_counted_and_no_error(running, admin):
    tier = ValkeyTierConfig(url=running.url, operation_timeout_s=PATIENT_S, tenant_quota_bytes=2500)
    store = build_page_store(KVStoreConfig(tiers=(tier,)), LAYOUT)
    try:
        for key in KEYS[:6]:
            assert store.save(key, make_page(LAYOUT, key.index))
        assert store.flush(PATIENT_S)
        num_held = len(stored_pages(admin))
        loaded = store.load(KEYS[:6], timeout_s=PATIENT_S).result(timeout=2 * PATIENT_S)
        stats = store.stats().tiers["valkey"]
        assert 0 < num_held == len(loaded.pages) == stats.num_puts < 6
        assert (stats.num_refused, stats.num_errors) == (6 - num_held, 0)
        assert sum(page.num_bytes for page in stored_pages(admin).values()) <= 2500
    finally:
        store.close()


async def test_in_a_cluster_a_tenant_has_one_quota_over_all_shards():
    cluster = ValkeyCluster()
    try:
        async with tier(cluster.url, 7 * SIZE, is_cluster=True) as ours:
            assert await put(ours, KEYS[:4]) == [True] * 4
            assert sum(await put(ours, KEYS[4:20])) == 3
            assert sum(await ours.contains_many(KEYS)) == 7
            assert await ours.delete_namespace(KEYS[0].namespace_id) == 7
            assert sum(await put(ours, KEYS[20:])) == 7
    finally:
        cluster.stop()
