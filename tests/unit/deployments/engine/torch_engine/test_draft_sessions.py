from __future__ import annotations

import torch

from deployments.engine.torch_engine.draft_sessions import SessionCaches, common_prefix


def test_a_cache_is_cut_to_the_shared_text_and_leaves_the_last_token():
    caches = SessionCaches(num_pages=4, max_sessions=4)
    cache = caches.take(1, range(70), set())
    cache.token_ids.extend(range(70))
    assert len(cache.pages) == 2
    assert sorted(cache.slots.tolist()) == sorted(
        slot for page in cache.pages for slot in range(page * 64, page * 64 + 64)
    )
    assert caches.take(1, range(70), set()).token_ids == list(range(69))
    assert caches.take(1, [0, 1, 2, 9, 9], set()).token_ids == [0, 1, 2]


def test_growing_keeps_the_slots_of_what_is_cached():
    caches = SessionCaches(num_pages=4, max_sessions=4)
    before = caches.take(1, range(64), set()).slots.clone()
    after = caches.take(1, range(65), set()).slots
    assert torch.equal(after[:64], before)
    assert len(after) == 128


def test_the_least_recently_used_gives_way_and_sessions_in_use_do_not():
    caches = SessionCaches(num_pages=3, max_sessions=8)
    for session in (1, 2, 3):
        caches.take(session, range(10), set())
    caches.take(1, range(10), set())
    caches.take(4, range(10), {3})
    assert [session in caches for session in (1, 2, 3, 4)] == [True, False, True, True]
    assert caches.take(5, range(10), {1, 3, 4}) is None
    assert caches.take(5, range(200), {1}) is None
    assert 1 in caches


def test_no_page_is_ever_lost_or_shared():
    caches = SessionCaches(num_pages=6, max_sessions=3)
    generator = torch.Generator().manual_seed(1)
    held = {}
    for _ in range(300):
        session, length, action = torch.randint(1, 300, (3,), generator=generator).tolist()
        session %= 6
        if action % 4 == 0:
            caches.drop(session)
        else:
            cache = caches.take(session, range(length), set())
            assert cache is not None
            held[session] = cache
        held = {known: cache for known, cache in held.items() if known in caches}
        pages = [page for cache in held.values() for page in cache.pages]
        assert len(held) <= 3
        assert len(set(pages)) == len(pages)
        assert len(pages) + caches.num_free_pages == 6


def test_common_prefix():
    assert common_prefix([1, 2, 3], (1, 2, 4, 5)) == 2
    assert common_prefix([1, 2], (1, 2, 4)) == 2
    assert common_prefix([], (1,)) == 0
