"""What is said about servers that are not set up to hold pages."""

import pytest
from pydantic import SecretStr
from redis.crc import key_slot

from cluster.config import ClusterConfig
from cluster.errors import ConfigError
from cluster.hot_tier import cluster_valkey, hot_tier
from cluster.kv_usage import valkey_usage
from kv_store import KVStoreConfig, TierUnavailableError, ValkeyTierConfig
from kv_store.tiers.valkey_settings import check_settings
from kv_store.tiers.valkey_topology import ValkeyAddress
from tests.valkey_processes import PASSWORD, ValkeyCluster, ValkeyProcess

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server():
    server = ValkeyProcess({})
    yield server
    server.stop()


@pytest.fixture
def settings(server):
    yield server.admin.config_set
    for name, value in {
        "maxmemory": "64mb",
        "maxmemory-policy": "allkeys-lfu",
        "save": "",
        "appendonly": "no",
    }.items():
        server.admin.config_set(name, value)


def address_of(server, **fields):
    return ValkeyAddress(url=f"redis://:{PASSWORD}@{server.address}/0", **fields)


def found(server):
    return check_settings(address_of(server), 5.0)


def test_a_cache_is_as_it_should_be(server):
    assert found(server) == []


@pytest.mark.parametrize(
    ("name", "value", "is_fatal", "word"),
    [
        ("maxmemory", 0, True, "maxmemory"),
        ("maxmemory-policy", "noeviction", False, "refuses new pages"),
        ("maxmemory-policy", "allkeys-random", False, "in use"),
        ("maxmemory-policy", "volatile-lru", None, ""),
        ("save", "900 1", False, "snapshots"),
        ("appendonly", "yes", False, "append-only"),
    ],
)
def test_each_setting_is_looked_at(server, settings, name, value, is_fatal, word):
    settings(name, value)
    problems = found(server)
    assert [problem.is_fatal for problem in problems] == ([] if is_fatal is None else [is_fatal])
    assert all(word in problem.text for problem in problems)


def test_a_user_without_info_and_config_is_only_a_warning(server):
    server.admin.acl_setuser(
        "narrow", enabled=True, reset=True, passwords=["+x"], commands=["+client|setinfo"]
    )
    [problem] = check_settings(ValkeyAddress(url=f"redis://narrow:x@{server.address}"), 5.0)
    assert not problem.is_fatal
    assert "cannot be checked" in problem.text


def test_a_replica_is_refused(server):
    replica = ValkeyProcess({"replicaof": f"127.0.0.1 {server.port}"})
    try:
        assert [p.text for p in found(replica) if p.is_fatal] == [
            "it is a replica, which takes no pages: name the primary, or its Sentinels"
        ]
    finally:
        replica.stop()


def test_nobody_there():
    with pytest.raises(TierUnavailableError):
        check_settings(ValkeyAddress(url="redis://127.0.0.1:1"), 1.0)


def test_every_shard_of_a_cluster_is_asked_and_counted():
    cluster = ValkeyCluster()
    try:
        address = ValkeyAddress(url=cluster.url, is_cluster=True)
        assert check_settings(address, 5.0) == []
        cluster.primaries[2].admin.config_set("maxmemory", 0)
        [problem] = check_settings(address, 5.0)
        assert problem.is_fatal
        assert problem.text.startswith(cluster.primaries[2].address)
        [problem, _] = check_settings(address_of(cluster.primaries[2]), 5.0)
        assert "is_cluster" in problem.text
        for number, slot_key in enumerate(["kv:{a}", "kv:{b}", "kv:{c}", "other"]):
            owner = key_slot(slot_key.encode()) * 3 // 16384
            cluster.primaries[owner].admin.set(slot_key, number)
        usage = valkey_usage(address)
        assert (usage.num_servers, usage.num_pages, usage.max_bytes) == (3, 3, 0)
    finally:
        cluster.stop()


def start(server, tmp_path):
    url = SecretStr(f"redis://:{PASSWORD}@{server.address}/0")
    config = ClusterConfig(kv=KVStoreConfig(tiers=(ValkeyTierConfig(url=url),)))
    said = []
    with hot_tier(config, tmp_path, said.append):
        assert cluster_valkey(tmp_path) == address_of(server)
    return said


def test_a_start_refuses_an_unbounded_server_and_warns_of_a_forgetful_one(
    server, settings, tmp_path
):
    assert start(server, tmp_path) == []
    settings("appendonly", "yes")
    [warning] = start(server, tmp_path)
    assert "append-only" in warning
    assert PASSWORD not in warning
    settings("maxmemory", 0)
    with pytest.raises(ConfigError, match=r"kv\.tiers: Valkey at .* set maxmemory"):
        start(server, tmp_path)
