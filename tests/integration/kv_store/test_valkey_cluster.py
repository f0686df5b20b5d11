"""Pages on a real cluster of three shards, and on a primary that a Sentinel names."""

from collections import Counter
from contextlib import asynccontextmanager, contextmanager

import numpy as np
import pytest
import redis
from pydantic import SecretStr
from redis.crc import key_slot

from kv_store import KVStoreConfig, TierUnavailableError, ValkeyTierConfig, build_page_store
from kv_store.codecs.raw import RawCodec
from kv_store.page_format import encode_page, section_offsets
from kv_store.tiers.valkey import ValkeyTier
from kv_store.tiers.valkey_batches import page_name
from kv_store.tiers.valkey_exchange import MAX_VALUE_BYTES
from kv_store.tiers.valkey_topology import ValkeyAddress
from tests.kv_pages import make_chain, make_layout, make_page, wait_until
from tests.valkey_processes import PASSWORD, ValkeyCluster, ValkeyProcess

pytestmark = pytest.mark.integration

LAYOUT = make_layout()
KEYS = make_chain(LAYOUT, 60)
ITEMS = [(key, bytes([key.index]) * 2000) for key in KEYS]
PATIENT_S = 20.0


@pytest.fixture(scope="module")
def running():
    cluster = ValkeyCluster()
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(running):
    for node in running.primaries:
        node.admin.flushall()
    return running


@asynccontextmanager
async def opened(address, **fields):
    settings = {
        "ttl_s": 60.0,
        "ttl_head_boost": 1.0,
        "connect_timeout_s": 5.0,
        "operation_timeout_s": 10.0,
        "max_connections": 2,
        "find_cuts": section_offsets,
    }
    tier = ValkeyTier(address, **(settings | fields))
    try:
        yield tier
    finally:
        await tier.aclose()


def of_cluster(cluster, **fields):
    return opened(ValkeyAddress(url=cluster.url, is_cluster=True), **fields)


def slot_of(key):
    return key_slot(page_name(key))


def owner_number(key):
    return next(number for number in range(3) if slot_of(key) < 16384 * (number + 1) // 3)


async def test_one_chain_s_pages_spread_over_all_shards_by_two_connections_each(cluster):
    async with of_cluster(cluster) as tier:
        assert await tier.contains_many(KEYS) == [False] * 60
        assert await tier.put_many(ITEMS[:50]) == [True] * 50
        assert await tier.contains_many(KEYS) == [True] * 50 + [False] * 10
        assert await tier.get_many(KEYS) == [blob for _, blob in ITEMS[:50]] + [None] * 10
        sizes = [node.admin.dbsize() for node in cluster.primaries]
        assert sizes == [Counter(map(owner_number, KEYS[:50]))[number] for number in range(3)]
        assert min(sizes) > 5
        for node in cluster.primaries:
            clients = node.admin.client_list("normal")
            clients = [c for c in clients if c["cmd"] in ("getex", "set", "exists")]
            assert 1 <= len(clients) <= 2  # the second one only if both were needed at once
            assert all(client["lib-name"].startswith("redis-py") for client in clients)
        assert await tier.delete_many([*KEYS[:3], KEYS[55]]) == 3
        assert await tier.contains_many(KEYS[:4]) == [False] * 3 + [True]


async def test_a_large_page_and_its_parts_are_on_one_shard(cluster):
    layout = make_layout(num_layers=24, num_kv_heads=14, head_dim=32, page_tokens=64)
    [key] = make_chain(layout, 1)
    page = np.random.default_rng(0).integers(0, 256, layout.nbytes, dtype=np.uint8)
    blob = encode_page(key, page, layout, RawCodec(), created_ms=0)
    assert len(blob) > 2 * MAX_VALUE_BYTES
    async with of_cluster(cluster) as tier:
        assert await tier.put_many([(key, blob)]) == [True]
        assert await tier.get_many([key]) == [blob]
    assert sorted(node.admin.dbsize() for node in cluster.primaries) == [0, 0, 4]


async def test_a_slot_that_moved_is_followed_and_remembered(cluster):
    key, blob = ITEMS[0]
    source = cluster.primaries[owner_number(key)]
    target = cluster.primaries[(owner_number(key) + 1) % 3]
    slot = slot_of(key)
    async with of_cluster(cluster) as tier:
        await tier.put_many(ITEMS)
        cluster.begin_move(slot, source, target)
        # The key is still at the source, which serves it.
        assert await tier.get_many(KEYS) == [blob for _, blob in ITEMS]
        cluster.move_keys(slot, source, target)
        # Between the two: ASK, for every kind of operation.
        assert await tier.contains_many(KEYS) == [True] * 60
        assert await tier.get_many([key]) == [blob]
        assert await tier.delete_many([key]) == 1
        assert await tier.get_many(KEYS[:2]) == [None, ITEMS[1][1]]
        assert await tier.put_many([(key, blob)]) == [True]
        assert target.admin.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot) == 1
        cluster.set_slot(slot, target)
        # MOVED, for a client with the old map.
        assert await tier.get_many(KEYS) == [blob for _, blob in ITEMS]
        assert await tier.contains_many(KEYS) == [True] * 60
        before = source.admin.info("errorstats").get("errorstat_MOVED", {}).get("count", 0)
        assert await tier.get_many([key]) == [blob]
        after = source.admin.info("errorstats").get("errorstat_MOVED", {}).get("count", 0)
        assert after == before
    cluster.begin_move(slot, target, source)
    cluster.move_keys(slot, target, source)
    cluster.set_slot(slot, source)


async def test_a_shard_whose_connections_break_ever_again_is_connected_to_ever_again(cluster):
    key, blob = ITEMS[0]
    owner = cluster.primaries[owner_number(key)]
    async with of_cluster(cluster) as tier:
        await tier.put_many([(key, blob)])
        before = owner.admin.info("stats")["total_connections_received"]
        for _ in range(120):  # redis-py's pools count up to a hundred
            owner.admin.client_kill_filter(_type="normal", skipme=True)
            wait_until(lambda: len(owner.admin.client_list("normal")) == 1)
            assert await tier.get_many([key]) == [blob]
        assert owner.admin.info("stats")["total_connections_received"] >= before + 120


async def test_a_full_shard_can_still_be_read(cluster):
    key, blob = ITEMS[0]
    full = cluster.primaries[owner_number(key)]
    other = next(key for key in KEYS[1:] if owner_number(key) == owner_number(KEYS[0]))
    async with of_cluster(cluster) as tier:
        await tier.put_many([(key, blob)])
        full.admin.config_set("maxmemory-policy", "noeviction")
        full.admin.config_set("maxmemory", 1)
        try:
            for _ in range(4):  # a breaker opens after three
                with pytest.raises(TierUnavailableError, match="OOM"):
                    await tier.put_many([(other, blob)])
            assert await tier.get_many([key]) == [blob]
        finally:
            full.admin.config_set("maxmemory", "64mb")
            full.admin.config_set("maxmemory-policy", "allkeys-lfu")


async def test_a_frozen_shard_costs_its_own_pages_only(cluster):
    frozen = cluster.primaries[1]
    async with of_cluster(cluster) as writer:
        await writer.put_many(ITEMS)
    # Long enough for the others on a busy machine; the frozen one is waited for a few times.
    async with of_cluster(cluster, operation_timeout_s=3.0) as tier:
        # It may ask any of them for the way, even the frozen one.
        assert await tier.contains_many(KEYS) == [True] * len(KEYS)
        frozen.freeze()
        try:
            for _ in range(5):  # its breaker opens on the way
                blobs = await tier.get_many(KEYS)
                assert blobs == [blob if owner_number(key) != 1 else None for key, blob in ITEMS]
            held = await tier.put_many([(KEYS[0]._replace(namespace_id=bytes(16)), b"new")])
            assert len(held) == 1
        finally:
            frozen.thaw()


def load(store):
    loaded = store.load(KEYS, timeout_s=PATIENT_S).result(timeout=2 * PATIENT_S)
    for index, page in enumerate(loaded.pages):
        assert np.array_equal(page, make_page(LAYOUT, index))
    return len(loaded.pages)


@contextmanager
def store_of(config):
    store = build_page_store(
        KVStoreConfig(tiers=(config,), breaker={"open_s": 0.02, "max_open_s": 0.05}), LAYOUT
    )
    try:
        yield store
    finally:
        store.close()


def save_all(store):
    for index, key in enumerate(KEYS):
        assert store.save(key, make_page(LAYOUT, index))
    assert store.flush(PATIENT_S)


def test_a_replica_takes_over_from_a_killed_primary_without_a_restart_of_ours(cluster):
    config = ValkeyTierConfig(
        url=SecretStr(cluster.url), is_cluster=True, operation_timeout_s=PATIENT_S
    )
    dead = cluster.primaries[0]
    with store_of(config) as store:
        save_all(store)
        assert load(store) == 60
        dead.admin.wait(1, 5000)
        dead.kill()
        cut = next(key.index for key in KEYS if owner_number(key) == 0)
        assert load(store) == cut  # the longest prefix whose pages are there
        cluster.replica.admin.execute_command("CLUSTER", "FAILOVER", "TAKEOVER")
        wait_until(lambda: load(store) == 60, PATIENT_S)
        assert store.stats().tiers["valkey"].num_corrupt == 0
        dead.start()  # as a replica now
        wait_until(lambda: dead.admin.info("replication")["role"] == "slave", PATIENT_S)
        cluster.primaries[0], cluster.replica = cluster.replica, dead
        assert load(store) == 60


async def test_a_cluster_that_is_used_as_one_server_says_what_is_wrong(cluster):
    url = f"redis://:{PASSWORD}@{cluster.primaries[0].address}/0"
    async with opened(ValkeyAddress(url=url)) as tier:
        with pytest.raises(TierUnavailableError, match="is_cluster"):
            await tier.put_many(ITEMS)


async def test_one_server_that_is_used_as_a_cluster_says_what_is_wrong():
    server = ValkeyProcess({})
    try:
        url = f"redis://:{PASSWORD}@{server.address}/0"
        async with opened(ValkeyAddress(url=url, is_cluster=True)) as tier:
            with pytest.raises(TierUnavailableError, match=r"[Cc]luster"):
                await tier.put_many(ITEMS)
    finally:
        server.stop()


async def test_an_unreachable_cluster_is_an_error_and_is_found_once_it_is_there(cluster):
    held = ValkeyAddress(url=cluster.url, is_cluster=True)
    nobody = ValkeyAddress(url="redis://127.0.0.1:1", is_cluster=True)
    async with opened(nobody) as tier:
        for _ in range(2):
            with pytest.raises(TierUnavailableError):
                await tier.contains_many(KEYS)
    async with opened(held) as tier:
        assert await tier.contains_many(KEYS[:1]) == [False]


@pytest.fixture
def watched():
    primary = ValkeyProcess({"repl-diskless-sync-delay": 0})
    host = f"127.0.0.1 {primary.port}"
    replica = ValkeyProcess({"replicaof": host, "repl-diskless-sync-delay": 0})
    wait_until(lambda: replica.admin.info("replication")["master_link_status"] == "up")
    sentinel = ValkeyProcess({"sentinel monitor pages": f"{host} 1"}, is_sentinel=True)
    sentinel.admin.execute_command("SENTINEL", "SET", "pages", "auth-pass", PASSWORD)
    wait_until(
        lambda: len(sentinel.admin.execute_command("SENTINEL", "REPLICAS", "pages")) == 1, 30
    )
    yield primary, replica, sentinel
    for process in (sentinel, replica, primary):
        process.stop()


def test_a_failover_by_sentinel_is_followed(watched):
    primary, replica, sentinel = watched
    config = ValkeyTierConfig(
        url=SecretStr(f"redis://:{PASSWORD}@pages/0"),
        sentinels=SecretStr(f"redis://{sentinel.address},127.0.0.1:1"),
    )
    with store_of(config) as store:
        save_all(store)
        assert load(store) == 60
        primary.admin.wait(1, 5000)
        wait_until(lambda: sentinel_failover(sentinel), 30)
        wait_until(lambda: replica.admin.info("replication")["role"] == "master", 30)
        wait_until(lambda: primary.admin.info("replication")["role"] == "slave", 30)

        def is_written_to_the_new_primary():
            replica.admin.flushall()
            save_all(store)
            return replica.admin.dbsize() == 60 and load(store) == 60

        wait_until(is_written_to_the_new_primary, 30)


def sentinel_failover(sentinel):
    try:
        return bool(sentinel.admin.execute_command("SENTINEL", "FAILOVER", "pages"))
    except redis.ResponseError as error:
        if "NOGOODSLAVE" in str(error) or "INPROG" in str(error):
            return False  # the Sentinel has not seen enough of the replica yet
        raise
