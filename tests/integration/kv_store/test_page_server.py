"""Two nodes with a folder each: one gets from the other what the Valkey server no longer has."""

from contextlib import contextmanager

import numpy as np
import pytest
import redis

from kv_store import (
    KVStoreConfig,
    PeersTierConfig,
    SsdTierConfig,
    ValkeyTierConfig,
    build_page_store,
)
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.page_directory import ServerAddress
from kv_store.tiers.valkey_admin import stored_pages
from kv_store.tiers.valkey_exchange import NOTE_SUFFIX
from tests.kv_pages import make_chain, make_layout, make_page, wait_until

pytestmark = pytest.mark.integration

LAYOUT = make_layout()
KEYS = make_chain(LAYOUT, 6)
PAGES = [make_page(LAYOUT, seed) for seed in range(6)]
PATIENT_S = 30.0
SECRET = "5e" * 32


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
def node(server, root, **fields):
    config = KVStoreConfig(
        tiers=(
            ValkeyTierConfig(url=server.url, connect_timeout_s=5.0, operation_timeout_s=10.0),
            SsdTierConfig(root=root, budget_bytes=1 << 22, segment_bytes=1 << 20),
            PeersTierConfig(connect_timeout_s=5.0, operation_timeout_s=20.0),
        ),
        breaker={"open_s": 0.02, "max_open_s": 0.05},
        moves=fields.pop("moves", None),
        **fields,
    )
    store = build_page_store(config, LAYOUT)
    try:
        yield store
    finally:
        store.close()


def publish(store, admin):
    """Save all pages, wait until others can find them, and take them out of the server."""
    for key, page in zip(KEYS, PAGES, strict=True):
        assert store.save(key, page.copy())
    assert store.flush(PATIENT_S)
    wait_until(lambda: num_records(admin) == 6, PATIENT_S)
    forget_pages(admin)


def num_records(admin):
    return sum(name.endswith(NOTE_SUFFIX) for name in admin.scan_iter(match="kv:{*"))


def forget_pages(admin):
    names = list(stored_pages(admin))
    assert len(names) == 6, "records are no pages"
    admin.unlink(*names)


def load(store):
    loaded = store.load(KEYS, timeout_s=PATIENT_S).result(timeout=2 * PATIENT_S)
    for page, expected in zip(loaded.pages, PAGES, strict=False):
        assert np.array_equal(page, expected)
    return list(loaded.tiers)


@pytest.mark.parametrize("secret", [None, SECRET], ids=["plain", "sealed"])
def test_a_node_gets_pages_of_another_and_passes_hot_ones_on(server, admin, tmp_path, secret):
    moves = {"head_pages": 2, "min_reads": 2}
    with (
        node(server, tmp_path / "a", encryption_key=secret) as ours,
        node(server, tmp_path / "b", encryption_key=secret, moves=moves) as theirs,
    ):
        publish(ours, admin)
        assert load(theirs) == ["peers"] * 6
        assert ours.stats().tiers["peers"].num_served >= 6
        assert theirs.flush(PATIENT_S)
        assert load(theirs) == ["valkey"] * 2 + ["peers"] * 4, "heads were copied at once"
        assert theirs.flush(PATIENT_S)
        assert load(theirs) == ["valkey"] * 6
        stats = theirs.stats().tiers
        assert (stats["peers"].num_puts, stats["peers"].num_errors) == (0, 0)
        assert stats["ssd"].num_promoted == stats["valkey"].num_promoted == 6


def test_damaged_pages_of_another_node_are_misses(server, admin, tmp_path):
    with node(server, tmp_path / "a") as ours, node(server, tmp_path / "b") as theirs:
        publish(ours, admin)
        for path in (tmp_path / "a").rglob("segment-*.log"):
            content = bytearray(path.read_bytes())
            for at in range(400, len(content), 4096):  # one record is one block
                content[at] ^= 1
            path.write_bytes(content)
        assert load(theirs) == []
        assert theirs.stats().tiers["peers"].num_corrupt > 0
        assert theirs.stats().num_loaded == 0
        wait_until(lambda: num_records(admin) < 6, PATIENT_S)  # nobody else shall find them


def test_a_node_that_has_gone_is_a_miss_and_the_next_on_its_folder_is_found(
    server, admin, tmp_path
):
    with node(server, tmp_path / "b") as theirs:
        with node(server, tmp_path / "a") as ours:
            publish(ours, admin)
            assert load(theirs) == ["peers"] * 6
        assert load(theirs) == []
        assert theirs.stats().tiers["peers"].num_errors == 0, "the way to the others is sound"
        with node(server, tmp_path / "a"):
            # Its records replace those of its forerunner, one by one.
            wait_until(lambda: load(theirs) == ["peers"] * 6, PATIENT_S)


def test_records_that_lead_nowhere_are_misses(server, admin, tmp_path):
    with node(server, tmp_path / "a") as ours, node(server, tmp_path / "b") as theirs:
        publish(ours, admin)
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        wrong = ServerAddress("127.0.0.1", port, "0" * 32).pack()
        for number, name in enumerate(sorted(admin.scan_iter(match="kv:{*"))):
            admin.set(name, wrong if number % 2 else b"\xff" * 40)
        assert load(theirs) == []
        assert theirs.stats().num_loaded == 0
