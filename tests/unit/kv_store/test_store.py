import asyncio
import errno
import os
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kv_store import (
    EXACT,
    KVStoreConfig,
    Landing,
    MemoryTierConfig,
    SsdTierConfig,
    TierUnavailableError,
    build_page_store,
)
from kv_store import spans as spans_module
from kv_store.faults import FaultPlan, FaultyTier
from kv_store.tiers.memory import MemoryTier
from tests.kv_pages import make_chain, make_layout, make_page, tier_counts, wait_until

LAYOUT = make_layout()
KEYS = make_chain(LAYOUT, 12)
PAGES = [make_page(LAYOUT, seed) for seed in range(12)]
PATIENT_S = 10.0


@contextmanager
def opened(config=None, wrap_tier=None, **fields):
    store = build_page_store(config or KVStoreConfig(**fields), LAYOUT, wrap_tier=wrap_tier)
    try:
        yield store
    finally:
        store.close()


def save(store, indices, keys=KEYS):
    for index in indices:
        assert store.save(keys[index], PAGES[index].copy())
    assert store.flush(PATIENT_S)


def load(store, keys=KEYS, timeout_s=PATIENT_S):
    """Tier names of the pages that came, once their bytes are checked."""
    loaded = store.load(keys, timeout_s=timeout_s).result(timeout=PATIENT_S)
    assert len(loaded.pages) == len(loaded.tiers)
    for key, page in zip(keys, loaded.pages, strict=False):
        assert np.array_equal(page, PAGES[key.index])
    return list(loaded.tiers)


def ssd(root, **fields):
    return SsdTierConfig(root=root, budget_bytes=1 << 22, segment_bytes=1 << 20, **fields)


def memory(name="memory", **fields):
    return MemoryTierConfig(name=name, **fields)


class Shelf:
    """Hands a test the tiers a store was built with, optionally misbehaving ones."""

    def __init__(self, tier_class=None, plan=None):
        self.tiers = {}
        self._tier_class = tier_class
        self._plan = plan

    def __call__(self, tier):
        if self._tier_class is not None:
            tier = self._tier_class(1 << 20, name=tier.name)
        self.tiers[tier.name] = tier
        return FaultyTier(tier, self._plan) if self._plan else tier

    def forget(self, name, keys):
        self._drive(self.tiers[name].delete_many(keys))

    def flip_a_bit(self, name, key, position=-1):
        tier = self.tiers[name]
        [blob] = self._drive(tier.get_many([key]))
        damaged = bytearray(blob)
        damaged[position] ^= 4
        self._drive(tier.delete_many([key]))
        self._drive(tier.put_many([(key, bytes(damaged))]))

    @staticmethod
    def _drive(coroutine):
        """A memory tier never waits, so its coroutines end at the first step."""
        with pytest.raises(StopIteration) as stop:
            coroutine.send(None)
        return stop.value.value


def kv_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]


def test_saved_pages_are_loaded_up_to_the_first_that_is_missing():
    with opened() as store:
        save(store, [0, 1, 2, 3, 4, 6])
        assert load(store) == ["memory"] * 5
        assert load(store, KEYS[6:8]) == ["memory"]
        assert load(store, KEYS[5:]) == []
        assert load(store, []) == []
        stats = store.stats()
        assert (stats.num_saved, stats.num_loaded, stats.num_queued) == (6, 6, 0)
        assert tier_counts(stats.tiers, "memory")[0] == 6


def find(store, keys=KEYS, timeout_s=PATIENT_S):
    return store.find(keys, timeout_s=timeout_s).result(timeout=PATIENT_S)


def test_what_is_found_is_what_a_load_would_begin_with(tmp_path):
    tiers = (memory(), ssd(tmp_path))
    shelf = Shelf()
    with opened(tiers=tiers, wrap_tier=shelf) as store:
        save(store, [0, 1, 2, 4])
        shelf.forget("memory", KEYS[1:2])  # the other tier still has it
        assert find(store) == 3
        assert find(store, KEYS[3:]) == 0
        assert find(store, KEYS[4:]) == 1
        assert find(store, []) == 0
        assert store.stats().num_loaded == 0


class Shared(MemoryTier):
    """Other replicas read it too; a put waits until a test lets it go on."""

    is_shared = True

    def __init__(self, budget_bytes, *, name):
        super().__init__(budget_bytes, name=name)
        self.may_put = threading.Event()

    async def put_many(self, items):
        while not self.may_put.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return await super().put_many(items)


def test_a_chain_is_settled_once_its_pages_lie_where_all_replicas_find_them(tmp_path):
    shared = Shared(1 << 20, name="hot")
    with opened(
        tiers=(memory("hot", operation_timeout_s=PATIENT_S), ssd(tmp_path)),
        wrap_tier=lambda tier: shared if tier.name == "hot" else tier,
    ) as store:
        assert store.settle(KEYS[:3], timeout_s=PATIENT_S).result(PATIENT_S) == 0, "nothing queued"
        for index in (0, 1, 2, 4):
            assert store.save(KEYS[index], PAGES[index].copy())
        settled = store.settle(KEYS[:5], timeout_s=10 * PATIENT_S)
        early = store.settle(KEYS[:5], timeout_s=0.05).result(PATIENT_S)
        assert (early, settled.done()) == (0, False)
        shared.may_put.set()
        assert settled.result(PATIENT_S) == 3
        Shelf._drive(shared.delete_many(KEYS[1:2]))
        assert find(store) == 3, "this replica has its own folder"
        assert store.settle(KEYS[:3], timeout_s=PATIENT_S).result(PATIENT_S) == 1
        assert store.settle([], timeout_s=PATIENT_S).result(PATIENT_S) == 0


@pytest.mark.parametrize("fault", [{"fail": 1.0}, {"delay": 1.0, "delay_s": 60.0}])
def test_nothing_is_settled_in_a_tier_that_fails_or_is_silent(fault):
    def broken(tier):
        return FaultyTier(Shared(1 << 20, name=tier.name), FaultPlan(**fault))

    with opened(wrap_tier=broken, close_timeout_s=0) as store:
        assert store.save(KEYS[0], PAGES[0].copy())
        assert store.settle(KEYS[:1], timeout_s=0.1).result(PATIENT_S) == 0


def test_a_namespace_is_cleared_in_every_tier_and_no_other(tmp_path):
    others = [key._replace(namespace_id=bytes(16)) for key in KEYS]
    with opened(tiers=(memory(), ssd(tmp_path))) as store:
        save(store, [0, 1, 2])
        save(store, [0, 1], others)
        cleared = store.clear(KEYS[0].namespace_id, timeout_s=PATIENT_S)
        assert cleared.result(timeout=PATIENT_S) == 6
        assert find(store) == 0
        assert find(store, others) == 2


@pytest.mark.parametrize("fault", [{"fail": 1.0}, {"delay": 1.0, "delay_s": 60.0}])
def test_a_tier_that_fails_or_is_silent_answers_questions_with_nothing(fault):
    with opened(wrap_tier=lambda tier: FaultyTier(tier, FaultPlan(**fault))) as store:
        assert find(store, timeout_s=0.05) == 0
        cleared = store.clear(KEYS[0].namespace_id, timeout_s=0.05)
        assert cleared.result(timeout=PATIENT_S) == 0


def test_questions_end_with_the_store():
    store = build_page_store(
        KVStoreConfig(close_timeout_s=0),
        LAYOUT,
        wrap_tier=lambda tier: FaultyTier(tier, FaultPlan(delay=1.0, delay_s=60.0)),
    )
    waiting = [store.find(KEYS, timeout_s=60.0) for _ in range(4)]
    store.close()
    assert [question.result(timeout=PATIENT_S) for question in waiting] == [0] * 4
    assert find(store) == 0


def test_pages_that_are_held_are_not_written_again():
    with opened() as store:
        save(store, [0, 1])
        save(store, [0, 1, 2])
        stats = store.stats()
        assert stats.num_saved == stats.tiers["memory"].num_puts == 3


@pytest.mark.parametrize("batch_pages", [1, 3, 8])
def test_lower_tiers_fill_holes_and_pages_move_up(batch_pages):
    shelf = Shelf()
    with opened(
        tiers=(memory("hot"), memory("warm")), load_batch_pages=batch_pages, wrap_tier=shelf
    ) as store:
        save(store, range(6))
        shelf.forget("hot", [KEYS[1], KEYS[4]])
        shelf.forget("warm", [KEYS[0]])
        assert load(store) == ["hot", "warm", "hot", "hot", "warm", "hot"]
        assert store.flush(PATIENT_S)
        assert load(store) == ["hot"] * 6


def test_a_page_behind_the_head_moves_up_at_its_second_read():
    shelf = Shelf()
    with opened(tiers=(memory("hot"), memory("warm")), wrap_tier=shelf) as store:
        save(store, range(8))
        shelf.forget("hot", KEYS[2:])
        assert load(store, KEYS[:8]) == ["hot"] * 2 + ["warm"] * 6
        assert store.flush(PATIENT_S)
        assert load(store, KEYS[:8]) == ["hot"] * 4 + ["warm"] * 4, "the head's pages at the first"
        assert store.flush(PATIENT_S)
        assert load(store, KEYS[:8]) == ["hot"] * 8
        tiers = store.stats().tiers
        assert (tiers["hot"].num_promoted, tiers["warm"].num_demoted) == (6, 0)


def test_pages_that_only_the_hot_tier_has_are_copied_down():
    shelf = Shelf()
    with opened(tiers=(memory("hot"), memory("warm")), wrap_tier=shelf) as store:
        save(store, range(8))
        shelf.forget("warm", KEYS[3:6])
        load(store, KEYS[:8])
        assert store.flush(PATIENT_S)
        shelf.forget("warm", KEYS[6:8])
        load(store, KEYS[:8])
        assert store.flush(PATIENT_S)
        assert store.stats().tiers["warm"].num_demoted == 3 + 2, "holes, and what was read twice"
        shelf.forget("hot", KEYS)
        assert load(store, KEYS[:8]) == ["warm"] * 8


class FleetingTier(MemoryTier):
    """Says that it keeps pages for a while only."""

    def life_s(self, key):
        return 60.0


def fleeting():
    """A store's arguments: over a tier that keeps pages, one that does not."""
    warm = MemoryTier(1 << 20, name="warm")
    tiers = {"hot": FleetingTier(1 << 20, name="hot"), "warm": warm}
    return tiers, {
        "tiers": (memory("hot"), memory("warm")),
        "moves": {"demote_before_s": 60.0, "min_reads": 99, "head_pages": 0},
        "wrap_tier": lambda tier: tiers[tier.name],
    }


def test_a_page_that_is_about_to_expire_is_copied_to_a_tier_that_keeps_it():
    tiers, arguments = fleeting()
    now = [time.monotonic()]
    with opened(**arguments) as store:
        mover = store._mover
        mover._clock = lambda: now[0]
        shelf = Shelf()
        shelf.tiers = tiers
        save(store, range(3))
        shelf.forget("warm", KEYS)
        assert load(store, KEYS[:2]) == ["hot"] * 2
        assert store.flush(PATIENT_S)
        assert store.stats().tiers["warm"].num_demoted == 0
        now[0] += 59.0
        save(store, [5])  # wakes it up
        wait_until(lambda: store.stats().tiers["warm"].num_demoted == 2)
        held = shelf._drive(tiers["warm"].contains_many(KEYS[:3]))
        assert held == [True, True, False], "the third was never known to be in the hot tier only"


def test_a_page_that_the_lower_tier_refused_is_given_to_it_before_it_expires():
    tiers, arguments = fleeting()
    now = [time.monotonic()]
    tiers["warm"] = MemoryTier(100, name="warm")
    with opened(**arguments) as store:
        store._mover._clock = lambda: now[0]
        save(store, [0, 1])
        tiers["warm"]._budget_bytes = 1 << 20
        now[0] += 59.0
        save(store, [2])
        wait_until(lambda: store.stats().tiers["warm"].num_demoted == 2)


def test_looking_after_pages_does_not_close_the_breaker_of_a_tier_that_fails():
    class Broken(MemoryTier):
        async def contains_many(self, keys):
            if keys:
                raise TierUnavailableError("gone")
            return []

    with opened(
        tiers=(memory("hot"), memory("warm")),
        wrap_tier=lambda tier: Broken(1, name="hot") if tier.name == "hot" else tier,
    ) as store:
        save(store, [0, 1])
        for _ in range(3):
            assert load(store, KEYS[:2]) == ["warm"] * 2
            assert store.flush(PATIENT_S)
        assert not store.stats().tiers["hot"].is_open


def test_damage_does_not_spread_to_another_tier():
    shelf = Shelf()
    with opened(tiers=(memory("hot"), memory("warm")), wrap_tier=shelf) as store:
        save(store, range(3))
        shelf.forget("hot", KEYS)
        real_get = shelf.tiers["warm"].get_many
        num_gets = [0]

        async def damaged_later(keys):
            num_gets[0] += 1
            blobs = await real_get(keys)
            if num_gets[0] > 1:  # what the load got is sound
                blobs = [blob[:-1] + bytes([blob[-1] ^ 1]) for blob in blobs]
            return blobs

        shelf.tiers["warm"].get_many = damaged_later
        assert load(store, KEYS[:3]) == ["warm"] * 3
        assert store.flush(PATIENT_S)
        tiers = store.stats().tiers
        assert (tiers["hot"].num_promoted, tiers["warm"].num_corrupt) == (0, 3)


def test_a_lossy_page_moves_as_it_is():
    shelf = Shelf()
    with opened(codec="int4", tiers=(memory("hot"), memory("warm")), wrap_tier=shelf) as store:
        keys = make_chain(LAYOUT, 1, store.fidelity)
        save(store, [0], keys)
        before = shelf._drive(shelf.tiers["hot"].get_many(keys))
        for tier in ("hot", "warm"):
            shelf.forget(tier, keys)
            assert store.load(keys, timeout_s=PATIENT_S).result().pages
            assert store.flush(PATIENT_S)
            assert shelf._drive(shelf.tiers[tier].get_many(keys)) == before


def test_more_served_pages_than_may_wait_are_not_looked_after():
    shelf = Shelf()
    with opened(
        tiers=(memory("hot"), memory("warm")), moves={"max_pages": 3}, wrap_tier=shelf
    ) as store:
        save(store, range(4))
        shelf.forget("hot", KEYS)
        load(store, KEYS[:4])
        assert store.flush(PATIENT_S)
        assert store.stats().num_moves_dropped == 4
        assert load(store, KEYS[:3]) == ["warm"] * 3
        assert store.flush(PATIENT_S)
        assert load(store, KEYS[:4]) == ["hot"] * 3 + ["warm"]


def test_promotion_can_be_switched_off():
    shelf = Shelf()
    with opened(tiers=(memory("hot"), memory("warm")), moves=None, wrap_tier=shelf) as store:
        save(store, [0])
        shelf.forget("hot", KEYS)
        assert load(store) == ["warm"]
        assert store.flush(PATIENT_S)
        assert load(store) == ["warm"]


@pytest.mark.parametrize("position", [0, 5, 40, 124, 130, 300, -1])
def test_a_flipped_bit_is_a_counted_miss_and_the_page_is_written_anew(position):
    shelf = Shelf()
    with opened(wrap_tier=shelf) as store:
        save(store, range(4))
        shelf.flip_a_bit("memory", KEYS[2], position)
        assert load(store, KEYS[:4]) == ["memory"] * 2
        assert tier_counts(store.stats().tiers, "memory") == (2 + 1, 1, 1)
        save(store, [2])
        assert load(store, KEYS[:4]) == ["memory"] * 4


def test_a_page_that_is_corrupt_in_one_tier_comes_from_the_other_and_is_refilled():
    shelf = Shelf()
    with opened(tiers=(memory("hot"), memory("warm")), wrap_tier=shelf) as store:
        save(store, range(3))
        shelf.flip_a_bit("hot", KEYS[1])
        assert load(store, KEYS[:3]) == ["hot", "warm", "hot"]
        assert tier_counts(store.stats().tiers, "hot") == (2, 1, 1)
        assert store.flush(PATIENT_S)
        assert load(store, KEYS[:3]) == ["hot"] * 3


def test_a_whole_page_under_the_wrong_key_is_not_served():
    shelf = Shelf()
    with opened(wrap_tier=shelf) as store:
        save(store, range(2))
        tier = shelf.tiers["memory"]
        [blob] = shelf._drive(tier.get_many([KEYS[1]]))
        shelf.forget("memory", [KEYS[0]])
        shelf._drive(tier.put_many([(KEYS[0], blob)]))
        assert load(store) == []
        assert tier_counts(store.stats().tiers, "memory")[2] == 1


def test_an_exact_reader_never_gets_a_lossy_page():
    shared = MemoryTier(1 << 20)
    with (
        opened(codec="int8", wrap_tier=lambda _: shared) as lossy,
        opened(wrap_tier=lambda _: shared) as exact,
    ):
        assert (lossy.fidelity, exact.fidelity) == ("lossy:int8", EXACT)
        lossy_keys = make_chain(LAYOUT, 2, lossy.fidelity)
        save(lossy, [0, 1], lossy_keys)
        assert load(exact, KEYS[:2]) == []
        # Even a writer that uses the wrong keys cannot pass a lossy page off as exact.
        save(lossy, [0])
        assert load(exact) == []
        assert load(exact, lossy_keys) == []
        assert len(lossy.load(lossy_keys, timeout_s=PATIENT_S).result().pages) == 2
        assert exact.stats().tiers["memory"].num_corrupt == 0


def test_int8_pages_are_close():
    with opened(codec="int8") as store:
        keys = make_chain(LAYOUT, 1, store.fidelity)
        save(store, [0], keys)
        [page] = store.load(keys, timeout_s=PATIENT_S).result().pages
        assert np.abs(page.view(np.float32) - PAGES[0].view(np.float32)).max() < 0.02


def test_lossless_codecs_share_a_namespace():
    shared = MemoryTier(1 << 20)
    custom = "docs.examples.custom_codec:BytePlaneCodec"
    with (
        opened(codec=custom, wrap_tier=lambda _: shared) as packed,
        opened(wrap_tier=lambda _: shared) as raw,
    ):
        save(raw, [0])
        save(packed, [1])
        assert load(packed) == ["memory"] * 2
        assert load(raw) == ["memory"], "a raw store lacks the custom codec: a miss"
        assert load(packed) == ["memory"] * 2, "and leaves the page in place"


def test_what_is_late_is_a_miss_and_what_came_is_kept():
    class SlowBehindTheFirst(MemoryTier):
        async def get_many(self, keys):
            if keys[0].index > 0:
                await gate.wait()
            return await super().get_many(keys)

    gate = asyncio.Event()
    with opened(load_batch_pages=1, wrap_tier=Shelf(SlowBehindTheFirst)) as store:
        save(store, range(3))
        assert load(store, timeout_s=2.0) == ["memory"]
        assert load(store, KEYS[1:], timeout_s=0.05) == []
        assert load(store, timeout_s=0) in ([], ["memory"])


def test_a_silent_hot_tier_leaves_time_for_the_warm_one():
    class Silent(MemoryTier):
        is_silent = False

        async def contains_many(self, keys):
            if self.is_silent:
                await asyncio.Event().wait()
            return await super().contains_many(keys)

    hot = Silent(1, name="hot")  # too small to hold a page
    with opened(
        tiers=(memory("hot", operation_timeout_s=60), memory("warm")),
        wrap_tier=lambda tier: hot if tier.name == "hot" else tier,
        moves=None,
    ) as store:
        save(store, range(2))
        hot.is_silent = True
        assert load(store, KEYS[:2], timeout_s=4.0) == ["warm"] * 2


def test_a_full_queue_drops_and_counts():
    shelf = Shelf(plan=FaultPlan(delay=1.0, delay_s=60.0))
    with opened(
        write_back={"max_pages": 2},
        close_timeout_s=0,
        tiers=(memory(operation_timeout_s=60),),
        wrap_tier=shelf,
    ) as store:
        assert [store.save(KEYS[i], PAGES[i].copy()) for i in range(4)] == [
            True,
            True,
            False,
            False,
        ]
        stats = store.stats()
        assert (stats.num_dropped, stats.num_queued) == (2, 2)
        assert not store.flush(0.01)


def test_too_many_loads_are_answered_empty():
    shelf = Shelf(plan=FaultPlan(delay=1.0, delay_s=60.0))
    with opened(
        max_pending_loads=1,
        close_timeout_s=0,
        tiers=(memory(operation_timeout_s=60),),
        wrap_tier=shelf,
    ) as store:
        waiting = store.load(KEYS, timeout_s=60)
        assert store.load(KEYS, timeout_s=60).result(timeout=0).pages == ()
        assert store.stats().num_loads_refused == 1
        assert not waiting.done()
    assert waiting.result(timeout=0).pages == (), "closing answers what is under way"


def make_landings(count):
    """Memory of pages whose layers lie apart, as in an engine's pool."""
    shape = (2, LAYOUT.num_layers, count, LAYOUT.nbytes // (2 * LAYOUT.num_layers))
    memory = np.zeros(shape, np.uint8)
    rows = [memory[:, :, page].transpose(1, 0, 2) for page in range(count)]
    return rows, [Landing(row) for row in rows]


@pytest.mark.parametrize("batch_pages", [1, 5, 32])
def test_pages_land_where_they_shall(batch_pages):
    with opened(load_batch_pages=batch_pages, num_codec_threads=3) as store:
        save(store, range(7))
        rows, landings = make_landings(9)
        loaded = store.load(KEYS[:9], timeout_s=PATIENT_S, into=landings).result(PATIENT_S)
        assert len(loaded.pages) == 7
        for index in range(7):
            assert loaded.pages[index] is rows[index]
            assert np.array_equal(rows[index].ravel(), PAGES[index])
        assert not any(row.any() for row in rows[7:])


def test_a_place_that_was_taken_back_ends_the_prefix_and_harms_nothing():
    with opened(tiers=(memory("hot"), memory("warm"))) as store:
        save(store, range(6))
        rows, landings = make_landings(6)
        landings[2].withdraw()
        loaded = store.load(KEYS[:6], timeout_s=PATIENT_S, into=landings).result(PATIENT_S)
        assert len(loaded.pages) == 2
        assert not rows[2].any()
        assert load(store, KEYS[:6]) == ["hot"] * 6, "the page was sound"


def test_a_damaged_page_lands_from_another_tier():
    shelf = Shelf()
    with opened(tiers=(memory("hot"), memory("warm")), wrap_tier=shelf) as store:
        save(store, range(3))
        shelf.flip_a_bit("hot", KEYS[1])
        rows, landings = make_landings(3)
        loaded = store.load(KEYS[:3], timeout_s=PATIENT_S, into=landings).result(PATIENT_S)
        assert loaded.tiers == ("hot", "warm", "hot")
        assert all(np.array_equal(row.ravel(), PAGES[i]) for i, row in enumerate(rows))


def test_close_is_idempotent_and_leaves_no_thread(tmp_path):
    before = set(kv_threads())
    store = build_page_store(KVStoreConfig(tiers=(memory(), ssd(tmp_path))), LAYOUT)
    save(store, range(3))
    assert load(store) == ["memory"] * 3
    assert set(kv_threads()) - before
    store.close()
    store.close()
    wait_until(lambda: set(kv_threads()) <= before)
    assert store.load(KEYS, timeout_s=1).result(timeout=0).pages == ()
    assert not store.save(KEYS[5], PAGES[5].copy())
    assert store.flush(0)


def test_close_writes_what_is_queued(tmp_path):
    config = KVStoreConfig(tiers=(ssd(tmp_path),))
    with opened(config) as store:
        for key, page in zip(KEYS, PAGES, strict=True):
            assert store.save(key, page.copy())
    with opened(config) as store:
        assert load(store) == ["ssd"] * 12


@pytest.mark.parametrize("page", [np.zeros(5, np.uint8), np.zeros(192, np.float32)])
def test_a_page_of_another_size_is_refused(page):
    with opened() as store:
        assert not store.save(KEYS[0], page)
        assert load(store) == []


def test_a_bug_in_a_tier_does_not_reach_the_caller():
    class Buggy(MemoryTier):
        async def get_many(self, keys):
            raise KeyError("a bug")

    with opened(wrap_tier=Shelf(Buggy)) as store:
        save(store, [0])
        assert load(store) == []


def test_a_bug_in_one_tier_is_no_affair_of_the_others():
    class Buggy(MemoryTier):
        async def contains_many(self, keys):
            raise KeyError("a bug")

        put_many = contains_many

        async def aclose(self):
            raise KeyError("a bug")

    warm = MemoryTier(1 << 20, name="warm")

    def wrap(tier):
        return Buggy(1 << 20, name=tier.name) if tier.name == "hot" else warm

    with opened(tiers=(memory("hot"), memory("warm")), wrap_tier=wrap) as store:
        save(store, range(12))
        assert load(store) == ["warm"] * 12
        assert store.stats().num_failed == 0
        assert store.stats().tiers["hot"].num_errors > 0
    assert warm._is_closed


@pytest.mark.parametrize("seed", range(4))
def test_misbehaving_tiers_lose_pages_but_never_lie(seed):
    plan = FaultPlan(
        seed=seed, fail=0.1, delay=0.2, delay_s=0.001, drop=0.1, corrupt=0.1, truncate=0.1
    )
    num_loaded = 0
    with opened(
        tiers=(memory("hot"), memory("warm")),
        load_batch_pages=3,
        breaker={"open_s": 0.001, "max_open_s": 0.001},
        wrap_tier=Shelf(plan=plan),
    ) as store:
        for _ in range(30):
            save(store, range(12))
            num_loaded += len(load(store))
        stats = store.stats()
        assert num_loaded == stats.num_loaded > 0
        assert sum(tier.num_corrupt for tier in stats.tiers.values()) > 0
        assert sum(tier.num_errors for tier in stats.tiers.values()) > 0


def test_pages_on_disk_survive_a_restart_and_each_store_has_its_own_folder(tmp_path):
    config = KVStoreConfig(tiers=(ssd(tmp_path),))
    with opened(config) as store, opened(config) as beside:
        save(store, range(4))
        save(beside, [7])
        assert load(beside) == []
    assert len(list(tmp_path.iterdir())) == 2
    with opened(config) as again:
        assert load(again) == ["ssd"] * 4


def test_a_byte_flipped_on_disk_is_a_counted_miss_and_refilled(tmp_path):
    config = KVStoreConfig(tiers=(ssd(tmp_path),))
    with opened(config) as store:
        save(store, range(3))
        [segment] = tmp_path.glob("*/segment-*.log")
        content = bytearray(segment.read_bytes())
        content[content.index(PAGES[1].tobytes()) + 17] ^= 1
        segment.write_bytes(content)
        assert load(store) == ["ssd"]
        assert tier_counts(store.stats().tiers, "ssd")[2] == 1
        save(store, [1])
        assert load(store) == ["ssd"] * 3


def test_a_disk_that_refuses_stops_writes_only_and_is_found_well_again(tmp_path, monkeypatch):
    config = KVStoreConfig(tiers=(ssd(tmp_path),), breaker={"open_s": 0.01, "max_open_s": 0.01})

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    with opened(config) as store:
        save(store, range(2))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", refuse)
            for index in range(2, 8):
                save(store, [index])
            stats = store.stats()
            assert stats.num_failed == 6
            assert stats.tiers["ssd"].num_errors >= 3
            assert stats.tiers["ssd"].is_open, "what is there can still be read"
            assert load(store) == ["ssd"] * 2

        def recovers():
            save(store, [2])
            return len(load(store)) == 3

        wait_until(recovers)


def test_a_folder_that_cannot_be_used_is_no_error_at_start_and_is_tried_again(tmp_path):
    root = tmp_path / "disk"
    root.write_text("not a folder yet")
    config = KVStoreConfig(
        tiers=(memory(), ssd(root)), breaker={"open_s": 0.01, "max_open_s": 0.01}
    )
    with opened(config) as store:
        save(store, range(3))
        assert load(store) == ["memory"] * 3
        assert store.stats().tiers["ssd"].num_errors > 0
        root.unlink()

        def recovers():
            save(store, range(3))
            return store.stats().tiers["ssd"].num_pages == 3

        wait_until(recovers)


@pytest.fixture
def spans(monkeypatch):
    """All that ended, by name."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(spans_module, "_tracer", provider.get_tracer("test"))

    def ended(name):
        return [span for span in exporter.get_finished_spans() if span.name == name]

    yield ended
    provider.shutdown()


def traced(number):
    return f"00-{number:032x}-{number:016x}-01"


def test_a_load_is_a_span_of_the_request_it_is_for(spans, tmp_path):
    with opened(tiers=(MemoryTierConfig(), ssd(tmp_path))) as store:
        save(store, range(2))
        store.load(KEYS[:3], timeout_s=PATIENT_S, traceparent=traced(7)).result()
        store.load(KEYS[:3], timeout_s=PATIENT_S, traceparent="nonsense").result()
    child, orphan = spans("kv.load")
    assert (child.context.trace_id, child.parent.span_id) == (7, 7)
    assert child.attributes["paceline.kv.pages_asked"] == 3
    assert child.attributes["paceline.kv.pages_loaded"] == 2
    assert child.attributes["paceline.kv.tiers"] == ("memory",)
    assert orphan.parent is None
    asked = [
        (span.attributes["paceline.kv.tier"], span.attributes["paceline.kv.pages_found"])
        for span in spans("kv.find")
        if span.parent.span_id == child.context.span_id
    ]
    assert asked == [("memory", 2), ("ssd", 0)]
    got, _ = spans("kv.get")
    assert got.parent.span_id == child.context.span_id
    assert got.attributes["paceline.kv.pages_found"] == 2
    assert got.attributes["paceline.kv.bytes"] > 2 * LAYOUT.nbytes


def test_a_save_is_a_span_of_the_requests_whose_pages_it_writes(spans, tmp_path):
    with opened(tiers=(MemoryTierConfig(), ssd(tmp_path))) as store:
        for index in range(4):
            store.save(KEYS[index], PAGES[index].copy(), traceparent=traced(1 + index // 2))
        store.save(KEYS[4], PAGES[4].copy())
        assert store.flush(PATIENT_S)
    saves = spans("kv.save")
    assert sum(span.attributes["paceline.kv.pages"] for span in saves) == 5
    # How many batches there were is a matter of time; every request has its spans or links to them.
    parents = {span.parent.span_id for span in saves if span.parent}
    links = {link.context.span_id for span in saves for link in span.links}
    assert parents | links == {1, 2}
    puts = spans("kv.put")
    assert {span.parent.span_id for span in puts} == {span.context.span_id for span in saves}
    taken = {"memory": 0, "ssd": 0}
    for span in puts:
        taken[span.attributes["paceline.kv.tier"]] += span.attributes["paceline.kv.pages_taken"]
    assert taken == {"memory": 5, "ssd": 5}
