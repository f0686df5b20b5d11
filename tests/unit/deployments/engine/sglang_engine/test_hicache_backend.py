"""The storage backend over real tiers; only the base class that SGLang hands out is a stand-in."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pydantic import SecretStr

from deployments.engine.errors import EngineSetupError
from deployments.engine.sglang_engine import shared_pages
from deployments.engine.sglang_engine.tier_link import (
    StatsWriter,
    TierLink,
    TierSettings,
    check_codec,
    folder_of,
    read_settings,
)
from kv_store import (
    BreakerConfig,
    EmbeddedValkeyTierConfig,
    KVStoreConfig,
    LayoutMismatchError,
    MemoryTierConfig,
    PageStoreStats,
    SsdTierConfig,
    TierStats,
    ValkeyTierConfig,
)
from kv_store.page_mover import PageMover
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.valkey_admin import admin_clients, read_page, stored_pages
from kv_store.tiers.valkey_topology import ValkeyAddress
from tests.kv_pages import wait_until

BACKEND = "deployments.engine.sglang_engine.hicache_backend"
PATIENT_S = 30.0
LAYERS, TOKENS, HEADS, DIM = 3, 8, 2, 4
NUM_PAGES = 160
SETTINGS = TierSettings(kv=KVStoreConfig(), model_digest="", arithmetic="", load_timeout_s=1.0)


class _Storage:
    def register_mem_pool_host(self, mem_pool_host):
        self.mem_pool_host = mem_pool_host


@dataclass
class _Metrics:
    prefetch_pgs: list = field(default_factory=list)
    backup_pgs: list = field(default_factory=list)
    prefetch_bandwidth: list = field(default_factory=list)
    backup_bandwidth: list = field(default_factory=list)


@pytest.fixture
def storage_class(monkeypatch):
    """The class, loaded as SGLang loads it."""
    storage = ModuleType("sglang.srt.mem_cache.hicache_storage")
    storage.HiCacheStorage = _Storage
    storage.PoolTransferResult = SimpleNamespace(empty=lambda: "nothing")
    metrics = ModuleType("sglang.srt.observability.metrics_collector")
    metrics.StorageMetrics = _Metrics
    monkeypatch.setitem(sys.modules, storage.__name__, storage)
    monkeypatch.setitem(sys.modules, metrics.__name__, metrics)
    monkeypatch.delitem(sys.modules, BACKEND, raising=False)
    yield importlib.import_module(BACKEND).PacelineStorage
    sys.modules.pop(BACKEND, None)


class Pool:
    """SGLang's host pool: the same axes in the same order."""

    def __init__(self, layout="page_first_direct", dtype=torch.bfloat16, seed=0):
        tokens = NUM_PAGES * TOKENS
        shapes = {
            "layer_first": (2, LAYERS, tokens, HEADS, DIM),
            "page_first": (2, tokens, LAYERS, HEADS, DIM),
            "page_first_direct": (2, NUM_PAGES, LAYERS, TOKENS, HEADS, DIM),
            "page_head": (2, NUM_PAGES, HEADS, TOKENS, LAYERS, DIM),
        }
        numbers = torch.Generator().manual_seed(seed)
        self.kv_buffer = torch.randn(shapes[layout], generator=numbers).to(dtype)
        self.layout, self.dtype, self.page_size = layout, dtype, TOKENS
        self.layer_num, self.head_num, self.head_dim, self.v_head_dim = LAYERS, HEADS, DIM, DIM

    def row(self, side, layer, page, token):
        """Of one token in one layer, as the axes say."""
        at = page * TOKENS + token
        return {
            "layer_first": lambda: self.kv_buffer[side, layer, at],
            "page_first": lambda: self.kv_buffer[side, at, layer],
            "page_first_direct": lambda: self.kv_buffer[side, page, layer, token],
        }[self.layout]()

    def flat(self, page):
        """A page as ``get_data_page`` of SGLang gives it."""
        start = page * TOKENS
        return {
            "layer_first": lambda: self.kv_buffer[:, :, start : start + TOKENS],
            "page_first": lambda: self.kv_buffer[:, start : start + TOKENS],
            "page_first_direct": lambda: self.kv_buffer[:, page : page + 1],
        }[self.layout]().flatten()


def same_page(left, left_page, right, right_page):
    return all(
        torch.equal(
            left.row(side, layer, left_page, token), right.row(side, layer, right_page, token)
        )
        for side in range(2)
        for layer in range(LAYERS)
        for token in range(TOKENS)
    )


def names(number, salt="one"):
    """A chain of page names."""
    chain, parent = [], salt.encode()
    for page in range(number):
        parent = hashlib.sha256(parent + bytes([page % 256])).digest()
        chain.append(parent.hex())
    return chain


def indices(pages):
    return torch.cat([torch.arange(page * TOKENS, (page + 1) * TOKENS) for page in pages])


class Rank:
    """A backend as SGLang opens it, and what it belongs to."""

    def __init__(self, storage_class, kv, pool=None, load_timeout_s=PATIENT_S, **changes):
        settings = TierSettings(
            kv=kv,
            model_digest=changes.pop("model_digest", "c0ffee"),
            arithmetic="test",
            load_timeout_s=load_timeout_s,
        )
        self.link = TierLink(settings)
        self.pool = pool or Pool()
        config = {
            "tp_rank": 0,
            "tp_size": 1,
            "pp_rank": 0,
            "pp_size": 1,
            "attn_cp_rank": 0,
            "attn_cp_size": 1,
            "is_mla_model": False,
            "enable_storage_metrics": True,
        }
        with self.link.offered() as offer:
            config["extra_config"] = json.loads(offer)
            self.backend = storage_class(SimpleNamespace(**config | changes), {})
            self.backend.register_mem_pool_host(self.pool)

    def set(self, chain, pages):
        return self.backend.batch_set_v1(chain, indices(pages), None)

    def get(self, chain, pages):
        return self.backend.batch_get_v1(chain, indices(pages), None)

    def wait_for(self, chain):
        wait_until(lambda: self.backend.batch_exists(chain) == len(chain), PATIENT_S)

    def close(self):
        self.backend.close()
        self.link.close()


@pytest.fixture
def open_rank(storage_class, monkeypatch):
    monkeypatch.setattr(shared_pages, "_SAVE_TIMEOUT_S", PATIENT_S)
    opened = []

    def open_one(kv=None, **changes):
        opened.append(Rank(storage_class, kv or KVStoreConfig(), **changes))
        return opened[-1]

    yield open_one
    for rank in opened:
        rank.close()


def on_disk(tmp_path, **fields):
    tier = SsdTierConfig(root=tmp_path / "ssd", budget_bytes=1 << 24, segment_bytes=1 << 20)
    return KVStoreConfig(tiers=(tier,), **fields)


@pytest.mark.parametrize("codec", ["raw", "lossless"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["page_first_direct", "layer_first", "page_first"])
def test_pages_come_back_bit_for_bit_into_other_places(open_rank, layout, dtype, codec):
    rank = open_rank(KVStoreConfig(codec=codec), pool=Pool(layout, dtype))
    before = Pool(layout, dtype)
    assert rank.set(names(3), [4, 0, 7]) == [True] * 3
    rank.wait_for(names(3))
    assert rank.get(names(3), [10, 12, 11]) == [True] * 3
    for source, target in zip([4, 0, 7], [10, 12, 11], strict=True):
        assert same_page(rank.pool, target, before, source)
    rest = [page for page in range(NUM_PAGES) if page not in {10, 11, 12}]
    assert all(same_page(rank.pool, page, before, page) for page in rest)


def test_one_layout_reads_what_another_wrote(open_rank, tmp_path):
    writer = open_rank(on_disk(tmp_path), pool=Pool("layer_first"))
    assert writer.set(names(2), [1, 2]) == [True, True]
    writer.wait_for(names(2))
    writer.close()  # its folder is claimed by the next one
    reader = open_rank(on_disk(tmp_path), pool=Pool("page_first_direct", seed=1))
    assert reader.get(names(2), [5, 6]) == [True, True]
    assert same_page(reader.pool, 5, writer.pool, 1)
    assert same_page(reader.pool, 6, writer.pool, 2)


def test_a_batch_of_128_pages_passes_a_queue_of_few(open_rank):
    config = KVStoreConfig()
    small = config.write_back.model_copy(update={"max_pages": 5})
    rank = open_rank(config.model_copy(update={"write_back": small}))
    before = Pool()
    assert rank.set(names(128), range(128)) == [True] * 128
    rank.wait_for(names(128))
    rank.pool.kv_buffer.zero_()
    assert rank.get(names(128), range(128)) == [True] * 128
    assert all(same_page(rank.pool, page, before, page) for page in range(128))
    assert rank.backend.get_stats().prefetch_pgs == [128]
    assert rank.backend.get_stats().prefetch_pgs == []


def test_saving_does_not_wait_for_pages_that_move_between_tiers(open_rank, tmp_path, monkeypatch):
    async def never(mover, served):
        await asyncio.Event().wait()

    monkeypatch.setattr(PageMover, "_spread", never)
    monkeypatch.setattr(shared_pages, "_SAVE_TIMEOUT_S", 1.0)
    two = (MemoryTierConfig(), *on_disk(tmp_path).tiers)
    rank = open_rank(KVStoreConfig(tiers=two))
    chain = names(4)
    assert rank.set(chain[:2], [0, 1]) == [True] * 2
    rank.wait_for(chain[:2])
    assert rank.get(chain[:2], [4, 5]) == [True] * 2
    assert rank.set(chain[2:], [2, 3]) == [True] * 2
    rank.wait_for(chain)


def test_what_follows_a_missing_page_is_not_loaded(open_rank):
    rank = open_rank()
    chain = names(4)
    rank.set(chain[:2], [0, 1])
    rank.set(chain[3:], [3])
    rank.wait_for(chain[3:])
    assert rank.backend.batch_exists(chain) == 2
    assert rank.get(chain, [4, 5, 6, 7]) == [True, True, False, False]
    assert same_page(rank.pool, 7, Pool(), 7)


def test_other_models_ranks_and_salts_have_other_names(open_rank, tmp_path):
    (root,) = (tier.root for tier in on_disk(tmp_path).tiers)
    first = open_rank(on_disk(tmp_path))
    first.set(names(2), [0, 1])
    first.wait_for(names(2))
    assert first.backend.batch_exists(names(2, salt="two")) == 0
    first.close()
    others = [{"model_digest": "decaf"}, {"tp_rank": 1, "tp_size": 2}, {"pp_rank": 1, "pp_size": 2}]
    for changes in [*others, {"pool": Pool(dtype=torch.float16)}, {}]:
        rank = open_rank(on_disk(tmp_path), **changes)
        assert root.exists()
        assert rank.backend.batch_exists(names(2)) == (0 if changes else 2)
        rank.close()


def test_the_calls_without_zero_copy_say_the_same(open_rank):
    rank = open_rank(pool=Pool("page_first"))
    (name, other) = names(2)
    assert rank.backend.set(name, rank.pool.flat(3))
    rank.wait_for([name])
    assert rank.backend.exists(name)
    assert torch.equal(rank.backend.get(name), rank.pool.flat(3))
    assert rank.backend.batch_set([name, other], [rank.pool.flat(3), rank.pool.flat(4)])
    rank.wait_for([name, other])
    found = rank.backend.batch_get([other, names(1, salt="two")[0]], [None, None])
    assert torch.equal(found[0], rank.pool.flat(4))
    assert found[1] is None
    assert rank.get([name, other], [8, 9]) == [True, True]
    assert same_page(rank.pool, 9, rank.pool, 4)


def test_cleared_pages_are_gone_and_can_be_saved_again(open_rank):
    rank = open_rank()
    rank.set(names(3), [0, 1, 2])
    rank.wait_for(names(3))
    rank.backend.clear()
    assert rank.backend.batch_exists(names(3)) == 0
    rank.set(names(3), [0, 1, 2])
    rank.wait_for(names(3))


def test_nonsense_is_a_miss_and_never_an_exception(open_rank):
    rank = open_rank()
    rank.set(names(1), [0])
    rank.wait_for(names(1))
    assert rank.backend.batch_exists(["no hash"]) == 0
    assert rank.backend.batch_get_v1(names(2), indices([0]), None) == [False] * 2
    assert rank.backend.batch_get_v1(keys=names(1), host_indices=torch.arange(3, 11)) == [False]
    assert rank.backend.batch_set_v1(names(1), torch.tensor([], dtype=torch.int64)) == [False]
    assert rank.backend.set(names(1)[0], torch.zeros(3)) is False
    assert rank.backend.set(names(1)[0]) is False
    assert rank.backend.get("no hash") is None
    transfer = SimpleNamespace(name="swa", keys=names(2))
    assert rank.backend.batch_get_v2([transfer]) == {"swa": [False, False]}
    assert rank.backend.batch_set_v2([transfer]) == {"swa": [False, False]}
    assert rank.backend.batch_exists_v2(names(1), [transfer]) == "nothing"


def test_a_closed_or_unopened_backend_misses(open_rank, storage_class):
    rank = open_rank()
    rank.set(names(1), [0])
    rank.wait_for(names(1))
    rank.backend.close()
    rank.backend.close()
    assert rank.backend.batch_exists(names(1)) == 0
    assert rank.get(names(1), [3]) == [False]
    assert rank.set(names(1), [3]) == [False]
    link = TierLink(SETTINGS)
    with link.offered() as offer:
        config = SimpleNamespace(is_mla_model=False, extra_config=json.loads(offer))
        unopened = storage_class(config, {})
    assert unopened.batch_exists(names(1)) == 0
    assert unopened.batch_get_v1(names(1), indices([0]), None) == [False]
    unopened.clear()
    unopened.close()
    link.close()


@pytest.mark.parametrize("changes", [{"layout": "page_head"}, {"dtype": torch.float8_e5m2}])
def test_pools_that_cannot_be_shared_are_refused_at_the_start(open_rank, changes):
    with pytest.raises(LayoutMismatchError, match="cannot be shared"):
        open_rank(pool=Pool(**changes))


def test_latent_attention_is_refused_at_the_start(open_rank):
    with pytest.raises(ValueError, match="latent attention"):
        open_rank(is_mla_model=True)


@pytest.mark.integration
def test_a_damaged_page_is_not_loaded_and_a_dead_server_costs_no_error(open_rank):
    server = EmbeddedValkey(64 << 20)
    server.start()
    tier = ValkeyTierConfig(url=SecretStr(server.url), connect_timeout_s=5.0, operation_timeout_s=5)
    breaker = BreakerConfig(max_failures=1, open_s=60.0, max_open_s=60.0)
    kv = KVStoreConfig(tiers=(tier,), breaker=breaker)
    try:
        rank = open_rank(kv)
        assert rank.set(names(3), [0, 1, 2]) == [True] * 3
        rank.wait_for(names(3))
        with admin_clients(ValkeyAddress(url=server.url), PATIENT_S) as (client,):
            for name in stored_pages(client):
                damaged = bytearray(read_page(client, name))
                damaged[-1] ^= 1
                client.set(name, bytes(damaged))
        assert rank.backend.batch_exists(names(3)) == 3
        assert rank.get(names(3), [10, 11, 12]) == [False] * 3
        assert all(same_page(rank.pool, page, Pool(), page) for page in (10, 11, 12))
        assert rank.backend.batch_exists(names(1)) == 0

        def num_corrupt():
            return sum(tier.num_corrupt for tier in rank.link.stats().tiers.values())

        wait_until(lambda: num_corrupt() > 0, PATIENT_S)
        assert rank.link.stats().num_saved == 3
    finally:
        server.stop()
    assert rank.backend.batch_exists(names(3)) == 0
    assert rank.get(names(3), [10, 11, 12]) == [False] * 3
    assert rank.set(names(3), [0, 1, 2]) == [True] * 3  # taken, and lost
    rank.backend.clear()


def test_counters_of_all_ranks_are_added():
    link = TierLink(SETTINGS)
    with link.offered() as offer:
        folder = folder_of(json.loads(offer))
    assert link.stats() == PageStoreStats()

    def counters(number):
        tier = TierStats(name="ssd", num_hits=number, num_pages=number - 2, is_open=number > 1)
        return lambda: PageStoreStats(num_saved=number, tiers={"ssd": tier})

    writers = [StatsWriter(folder, counters(number)) for number in (1, 2)]
    for writer in writers:
        writer.close()
    total = TierStats(name="ssd", num_hits=3, num_pages=-1, num_bytes=-1, is_open=False)
    assert link.stats() == PageStoreStats(num_saved=3, tiers={"ssd": total})
    link.close()
    StatsWriter(folder, counters(1)).close()  # its replica is gone


def test_settings_travel_whole_and_only_while_they_are_offered():
    kv = KVStoreConfig(
        codec="lossless",
        tiers=(
            ValkeyTierConfig(url=SecretStr("redis://user:pass@host:1"), ttl_s=7.0),
            EmbeddedValkeyTierConfig(name="own"),
            MemoryTierConfig(budget_bytes=5),
        ),
        encryption_key=SecretStr("ab" * 32),
    )
    settings = TierSettings(kv=kv, model_digest="d", arithmetic="a", load_timeout_s=2.5)
    link = TierLink(settings)
    with link.offered() as offer:
        assert "pass" not in offer
        assert "abab" not in offer
        extra = json.loads(offer)
        assert (extra["prefetch_threshold"], extra["prefetch_timeout_base"]) == (64, 2.5)
        folder = folder_of(extra)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert [path.stat().st_mode & 0o777 for path in folder.iterdir()] == [0o600]
        assert read_settings(folder) == settings
    with pytest.raises(FileNotFoundError):
        read_settings(folder)
    link.close()
    assert not folder.exists()
    with pytest.raises(ValueError, match="paceline_folder"):
        folder_of({"backend_name": "another"})


def test_codecs_that_lose_something_are_refused():
    check_codec(KVStoreConfig(codec="raw"))
    check_codec(KVStoreConfig(codec="lossless"))
    for codec in ("int8", "no such codec"):
        with pytest.raises(EngineSetupError, match=r"kv\.codec"):
            check_codec(KVStoreConfig(codec=codec))
