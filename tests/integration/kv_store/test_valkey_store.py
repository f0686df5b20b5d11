"""The store over a real Valkey server, which is late, dies, and comes back."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.kv_pages import valkey_pages
from kv_store import (
    EmbeddedValkeyTierConfig,
    KVStoreConfig,
    SsdTierConfig,
    TierUnavailableError,
    ValkeyTierConfig,
    build_page_store,
)
from kv_store.tiers import embedded_valkey
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.parts import split
from kv_store.tiers.valkey_batches import page_name
from kv_store.tiers.valkey_exchange import MAX_VALUE_BYTES
from kv_store.tiers.valkey_topology import ValkeyAddress
from tests.kv_pages import make_chain, make_layout, make_page, tier_counts, wait_until

pytestmark = pytest.mark.integration

LAYOUT = make_layout()
KEYS = make_chain(LAYOUT, 6)
PAGES = [make_page(LAYOUT, seed) for seed in range(6)]
PATIENT_S = 10.0
TIER_FIELDS = ("operation_timeout_s", "ttl_s")
ROOT = Path(__file__).parents[3]


@pytest.fixture
def server():
    server = EmbeddedValkey(64 << 20)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def admin(server):
    with redis.Redis.from_url(server.url) as client:
        yield client


@contextmanager
def opened(url, **fields):
    of_tier = {name: fields.pop(name) for name in TIER_FIELDS if name in fields}
    tier = ValkeyTierConfig(
        **({"url": url, "connect_timeout_s": 2.0, "operation_timeout_s": 5.0} | of_tier)
    )
    config = KVStoreConfig(
        tiers=(tier, *fields.pop("more_tiers", ())),
        breaker={"open_s": 0.02, "max_open_s": 0.05},
        **fields,
    )
    store = build_page_store(config, LAYOUT)
    try:
        yield store
    finally:
        store.close()


def save(store, indices):
    for index in indices:
        assert store.save(KEYS[index], PAGES[index].copy())
    assert store.flush(PATIENT_S)


def load(store, keys=KEYS):
    loaded = store.load(keys, timeout_s=PATIENT_S).result(timeout=2 * PATIENT_S)
    for key, page in zip(keys, loaded.pages, strict=False):
        assert np.array_equal(page, PAGES[key.index])
    return list(loaded.tiers)


def test_a_page_of_another_replica_is_kept_on_disk_before_it_expires(server, admin, tmp_path):
    disk = SsdTierConfig(root=tmp_path, budget_bytes=1 << 22, segment_bytes=1 << 20)
    with (
        opened(server.url) as writer,
        opened(server.url, more_tiers=(disk,), moves={"min_reads": 9, "head_pages": 0}) as reader,
        opened(server.url, ttl_s=600.0, more_tiers=(disk,), moves={"min_reads": 9}) as short,
    ):
        now = [time.monotonic()]
        short._mover._clock = lambda: now[0]
        save(writer, range(6))
        assert load(reader) == ["valkey"] * 6
        assert load(short, KEYS[4:]) == ["valkey"] * 2
        assert short.flush(PATIENT_S)
        assert short.stats().tiers["ssd"].num_demoted == 0
        now[0] += 1200.0
        save(short, [0])  # wakes it up
        wait_until(lambda: short.stats().tiers["ssd"].num_demoted == 2)
        admin.flushall()
        assert load(short, KEYS[4:]) == ["ssd"] * 2
        assert reader.stats().tiers["ssd"].num_demoted == 0, "theirs live for an hour"


def test_pages_move_up_to_a_server_that_lost_them(server, admin, tmp_path):
    disk = SsdTierConfig(root=tmp_path, budget_bytes=1 << 22, segment_bytes=1 << 20)
    with opened(server.url, more_tiers=(disk,), moves={"head_pages": 2}) as store:
        save(store, range(6))
        admin.flushall()
        for expected in (["ssd"] * 6, ["valkey"] * 2 + ["ssd"] * 4, ["valkey"] * 6):
            assert load(store) == expected
            assert store.flush(PATIENT_S)
        assert store.stats().tiers["valkey"].num_promoted == 6
        admin.delete(name_of(admin, KEYS[3]))
        assert load(store) == ["valkey"] * 3 + ["ssd"] + ["valkey"] * 2
        assert store.flush(PATIENT_S)
        assert load(store) == ["valkey"] * 6


def test_of_two_stores_that_miss_a_chain_the_second_waits_for_the_first(server, admin):
    flight = {"claim_s": 60.0, "wait_s": PATIENT_S, "min_pages": 1}
    with (
        opened(server.url, single_flight=flight) as first,
        opened(server.url, single_flight=flight) as second,
    ):
        assert load(first) == []
        assert load(first) == [], "it does not wait for itself"
        assert 0 < admin.pttl(page_name(KEYS[0]) + b":claim") <= 60_000
        num_claims = claims_asked(admin)
        waiting = second.load(KEYS, timeout_s=2 * PATIENT_S)
        wait_until(lambda: claims_asked(admin) > num_claims)  # it has missed, and waits
        save(first, range(6))
        assert waiting.result(timeout=2 * PATIENT_S).tiers == ("valkey",) * 6
        assert second.stats().num_flights_joined > 0
        assert len(list(valkey_pages(ValkeyAddress(url=server.url)))) == 6, "claims are no pages"


def test_a_claim_of_a_store_that_died_lapses(server):
    flight = {"claim_s": 0.05, "wait_s": PATIENT_S}
    with opened(server.url, single_flight=flight) as second:
        with opened(server.url, single_flight=flight) as first:
            assert load(first) == []
        assert load(second) == []
        assert second.stats().num_flights_joined == 0


def test_dropping_a_page_takes_its_parts_with_it_and_leaves_the_others(server, admin):
    with opened(server.url) as store:
        save(store, range(3))
        large = page_name(KEYS[5])
        manifest, parts = split(bytes(5 << 20), (), MAX_VALUE_BYTES)
        for name, part in zip(manifest.part_names(large), parts, strict=True):
            admin.set(name, bytes(part))
        admin.set(large, manifest.pack())
        address = ValkeyAddress(url=server.url)
        sizes = {page.page_hash: page.num_bytes for page in valkey_pages(address)}
        assert len(sizes) == 4
        assert sizes[KEYS[5].page_hash.hex()] > 5 << 20
        for page in valkey_pages(address):
            if page.page_hash in (KEYS[5].page_hash.hex(), KEYS[1].page_hash.hex()):
                assert page.drop()
                assert not page.drop()
        assert {page.page_hash for page in valkey_pages(address)} == {
            KEYS[0].page_hash.hex(),
            KEYS[2].page_hash.hex(),
        }
        assert admin.dbsize() == 2
        assert load(store) == ["valkey"]


def kill(server, admin):
    os.kill(int(admin.info("server")["process_id"]), signal.SIGKILL)
    wait_until(lambda: not server.is_running)


def claims_asked(admin):
    """How often pages were claimed, in the server's own count; saving counts as well."""
    return admin.info("commandstats").get("cmdstat_set", {}).get("calls", 0)


def name_of(admin, key):
    [name] = admin.keys(f"kv:*{key.page_hash.hex()}*")
    return name


def test_one_store_reads_what_another_wrote(server):
    with opened(server.url) as writer, opened(server.url) as reader:
        save(writer, range(4))
        assert load(reader) == ["valkey"] * 4
        save(reader, [4])
        assert load(writer) == ["valkey"] * 5


def test_a_flipped_byte_is_a_counted_miss_and_refilled(server, admin):
    with opened(server.url) as store:
        save(store, range(3))
        name = name_of(admin, KEYS[1])
        byte = admin.getrange(name, 200, 200)
        admin.setrange(name, 200, bytes([byte[0] ^ 1]))
        assert load(store) == ["valkey"]
        assert tier_counts(store.stats().tiers, "valkey")[2] == 1
        assert not admin.exists(name)
        save(store, [1])
        assert load(store) == ["valkey"] * 3


def test_heads_of_chains_live_longer_and_reads_start_the_time_anew(server, admin):
    with opened(server.url) as store:
        save(store, range(6))
        names = [name_of(admin, key) for key in KEYS]
        lives = [admin.pttl(name) for name in names]
        assert lives == sorted(lives, reverse=True)
        assert lives[0] > 1.9 * 3_600_000
        assert 3_600_000 < lives[5] < 1.2 * 3_600_000
        admin.pexpire(names[0], 60_000)
        load(store, KEYS[:1])
        assert admin.pttl(names[0]) > 1.9 * 3_600_000


def test_a_server_that_is_late_dies_and_comes_back_is_used_without_a_restart(
    server, admin, tmp_path
):
    server.stop()
    disk = SsdTierConfig(root=tmp_path, budget_bytes=1 << 22, segment_bytes=1 << 20)
    with opened(server.url, more_tiers=(disk,)) as store:

        def is_written_to_valkey():
            save(store, range(4))
            load(store)  # copies pages up again
            assert store.flush(PATIENT_S)
            return load(store) == ["valkey"] * 4

        save(store, range(4))
        assert load(store) == ["ssd"] * 4
        assert store.stats().tiers["valkey"].num_errors > 0
        wait_until(lambda: load(store) == ["ssd"] * 4 and not store.stats().tiers["valkey"].is_open)

        server.start()
        wait_until(is_written_to_valkey)
        assert store.stats().tiers["valkey"].is_open

        kill(server, admin)
        assert load(store) == ["ssd"] * 4
        server.start()
        wait_until(is_written_to_valkey)


def test_a_lone_server_that_dies_makes_misses_not_errors(server, admin):
    with opened(server.url) as store:
        save(store, range(2))
        kill(server, admin)
        for _ in range(5):
            assert load(store) == []
        save(store, [3])
        assert store.stats().num_failed == 1


def test_a_frozen_server_is_found_out(server, admin):
    process = psutil.Process(int(admin.info("server")["process_id"]))
    with opened(server.url) as patient, opened(server.url, operation_timeout_s=0.2) as store:
        save(patient, range(2))
        wait_until(lambda: load(store) == ["valkey"] * 2)
        process.suspend()
        try:
            wait_until(lambda: load(store) == [] and not store.stats().tiers["valkey"].is_open)
        finally:
            process.resume()
        wait_until(lambda: load(store) == ["valkey"] * 2)


def test_a_full_server_refuses_writes_and_still_gives(server, admin):
    with opened(server.url) as store:
        save(store, range(2))
        admin.config_set("maxmemory-policy", "noeviction")
        admin.config_set("maxmemory", 1)
        for index in range(2, 6):
            save(store, [index])
        stats = store.stats()
        assert stats.num_failed == 4
        assert stats.tiers["valkey"].is_open
        assert load(store) == ["valkey"] * 2


def test_the_embedded_server_wants_its_password_and_keeps_nothing_on_disk(server, admin):
    host, _, port = server.url.rpartition("@")[2].partition("/")[0].partition(":")
    once = Retry(NoBackoff(), 0)
    with (
        redis.Redis(host=host, port=int(port), retry=once) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
    assert server.url not in repr(server)
    assert admin.config_get("save") == {"save": ""}
    assert admin.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lfu"}


def test_a_stopped_server_is_gone_with_its_folder_and_restarts_under_the_same_url(server, admin):
    folder = Path(admin.config_get("dir")["dir"])
    process = psutil.Process(int(admin.info("server")["process_id"]))
    url = server.url
    server.stop()
    server.stop()
    assert not process.is_running()
    assert not folder.exists()
    with pytest.raises(redis.ConnectionError):
        admin.ping()
    server.start()
    assert server.url == url
    assert admin.ping()


def test_a_server_is_stopped_though_a_forked_child_holds_its_pipe(server, admin, monkeypatch):
    monkeypatch.setattr(embedded_valkey, "_STOP_S", 0.2)
    folder = Path(admin.config_get("dir")["dir"])
    its_child = os.dup(server._guard.stdin.fileno())  # what a child has that runs no other program
    stopping = threading.Thread(target=server.stop, daemon=True)
    try:
        stopping.start()
        stopping.join(PATIENT_S)
        assert not stopping.is_alive()
    finally:
        os.close(its_child)
    assert not folder.exists()
    with pytest.raises(redis.ConnectionError):
        admin.ping()
    server.start()
    assert admin.ping()


def test_a_server_never_started_has_no_url():
    with pytest.raises(TierUnavailableError):
        _ = EmbeddedValkey(64 << 20).url


def test_the_embedded_server_does_not_outlive_a_killed_owner():
    script = (
        "import sys, time, redis\n"
        "from kv_store.tiers.embedded_valkey import EmbeddedValkey\n"
        "server = EmbeddedValkey(64 << 20)\n"
        "server.start()\n"
        "client = redis.Redis.from_url(server.url)\n"
        "print(client.info('server')['process_id'], client.config_get('dir')['dir'], flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as owner:
        try:
            pid, folder = owner.stdout.readline().split()
            assert psutil.pid_exists(int(pid))
        finally:
            owner.kill()
    wait_until(lambda: not psutil.pid_exists(int(pid)) and not Path(folder).exists())


def test_a_store_owns_the_embedded_server_of_its_configuration():
    config = KVStoreConfig(tiers=(EmbeddedValkeyTierConfig(max_memory_bytes=64 << 20),))
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    store = build_page_store(config, LAYOUT)
    save(store, range(3))
    assert load(store) == ["embedded_valkey"] * 3
    started = [
        child for child in psutil.Process().children(recursive=True) if child.pid not in before
    ]
    assert started
    store.close()
    wait_until(lambda: not any(child.is_running() for child in started))
