import numpy as np
import pytest
from pydantic import ValidationError

from kv_store import KVStoreConfig, SsdTierConfig
from kv_store.factory import build_page_store
from kv_store.faults import FaultPlan, FaultyTier
from kv_store.tiers.memory import MemoryTier
from kv_store.tiers.sealed import SEAL_BYTES, SealedTier
from tests.kv_pages import make_chain, make_layout, make_page, tier_counts

LAYOUT = make_layout()
KEYS = make_chain(LAYOUT, 4)
SECRET = bytes(range(32))
BLOB = b"keys and values " * 500


@pytest.fixture
def inner():
    return MemoryTier(1 << 20)


@pytest.fixture
def sealed(inner):
    return SealedTier(inner, SECRET)


async def test_what_is_stored_shows_nothing_and_never_twice_the_same(sealed, inner):
    await sealed.put_many([(KEYS[0], BLOB)])
    [first] = inner._blobs.values()
    await sealed.delete_many(KEYS[:1])
    await sealed.put_many([(KEYS[0], memoryview(BLOB))])
    [second] = inner._blobs.values()
    assert len(first) == len(second) == len(BLOB) + SEAL_BYTES
    assert first != second
    assert BLOB[:16] not in first
    assert await sealed.get_many(KEYS[:1]) == [BLOB]


async def test_pages_of_another_secret_are_neither_found_nor_deleted(sealed, inner):
    await sealed.put_many([(KEYS[0], BLOB)])
    stranger = SealedTier(inner, bytes(32))
    assert await stranger.contains_many(KEYS[:1]) == [False]
    assert await stranger.get_many(KEYS[:1]) == [None]
    assert await stranger.delete_many(KEYS[:1]) == 0
    assert await sealed.get_many(KEYS[:1]) == [BLOB]


async def test_a_page_put_in_another_s_place_does_not_open(sealed, inner):
    await sealed.put_many(list(zip(KEYS, [BLOB] * 4, strict=True)))
    others = [KEYS[0]._replace(namespace_id=bytes(16)), KEYS[0]._replace(index=1)]
    await sealed.put_many([(key, BLOB) for key in others])
    stored = list(inner._blobs.values())
    for name in inner._blobs:
        inner._blobs[name] = stored[0]
    opened = await sealed.get_many([*KEYS, *others])
    assert opened == [BLOB, *[b""] * 5]


async def test_any_changed_byte_and_any_cut_opens_nothing(sealed, inner):
    await sealed.put_many([(KEYS[0], BLOB)])
    [(name, stored)] = inner._blobs.items()
    forged = [stored[:end] for end in (0, 1, SEAL_BYTES - 1, SEAL_BYTES, len(stored) - 1)]
    for place in (0, 11, 12, 100, len(stored) - 1):
        damaged = bytearray(stored)
        damaged[place] ^= 1
        forged.append(bytes(damaged))
    for blob in forged:
        inner._blobs[name] = blob
        assert await sealed.get_many(KEYS[:1]) == [b""]


def test_a_secret_of_another_length_is_refused(inner):
    with pytest.raises(ValueError, match="32 bytes"):
        SealedTier(inner, b"short")


@pytest.mark.parametrize("key", ["", "00" * 31, "zz" * 32])
def test_a_configured_key_is_64_hex_digits(key):
    with pytest.raises(ValidationError, match="64 hex digits"):
        KVStoreConfig(encryption_key=key)


def opened(root, key, plan=None):
    config = KVStoreConfig(
        encryption_key=key,
        tiers=(SsdTierConfig(root=root, budget_bytes=1 << 22, segment_bytes=1 << 20),),
    )
    return build_page_store(config, LAYOUT, wrap_tier=lambda tier: FaultyTier(tier, plan))


def test_a_store_with_a_key_reads_its_own_pages_and_finds_damage_out_and_no_strangers(tmp_path):
    mine = SECRET.hex()
    store = opened(tmp_path, mine, FaultPlan())
    for index, key in enumerate(KEYS):
        store.save(key, make_page(LAYOUT, index))
    assert store.flush(20)
    loaded = store.load(KEYS, timeout_s=20).result()
    assert [bytes(page) for page in loaded.pages] == [
        bytes(make_page(LAYOUT, index)) for index in range(4)
    ]
    store.close()
    [segment] = tmp_path.glob("replica-0/segment-*.log")
    assert bytes(make_page(LAYOUT, 0))[:64] not in segment.read_bytes()

    damaged = opened(tmp_path, mine, FaultPlan(seed=1, corrupt=1.0))
    assert damaged.load(KEYS[:1], timeout_s=20).result().pages == ()
    assert tier_counts(damaged.stats().tiers, "ssd")[2] == 1
    damaged.close()

    stranger = opened(tmp_path, bytes(32).hex(), FaultPlan())
    assert stranger.load(KEYS[1:], timeout_s=20).result().pages == ()
    assert tier_counts(stranger.stats().tiers, "ssd") == (0, 3, 0)
    stranger.close()

    store = opened(tmp_path, mine, FaultPlan())
    assert np.array_equal(
        store.load(KEYS[2:3], timeout_s=20).result().pages[0], make_page(LAYOUT, 2)
    )
    store.close()
