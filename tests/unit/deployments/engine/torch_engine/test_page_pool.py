from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.torch_engine.page_pool import Loan, PagePool
from kv_store.keys import PageKey
from kv_store.landing import Landing


def keys(name: str, count: int) -> list[PageKey]:
    return [PageKey(b"n" * 16, f"{name}{i}".encode().ljust(32), i) for i in range(count)]


def fill(pool: PagePool, chain: list[PageKey]) -> list[int]:
    pages = [pool.allocate() for _ in chain]
    for page, key in zip(pages, chain, strict=True):
        assert pool.publish(page, key)
    return pages


def test_every_page_is_handed_out_once():
    pool = PagePool(4)
    assert sorted(pool.allocate() for _ in range(4)) == [0, 1, 2, 3]
    assert pool.allocate() is None
    assert pool.num_free == 0


def test_released_chain_can_be_acquired_again_by_any_prefix():
    pool = PagePool(4)
    chain = keys("a", 3)
    pages = fill(pool, chain)
    pool.release(pages)
    assert pool.num_free == 4
    assert pool.acquire_prefix(chain[:2]) == pages[:2]
    assert pool.num_free == 2
    assert pool.acquire_prefix([keys("b", 1)[0], *chain]) == []
    pool.check_integrity([pages[:2]])


def test_eviction_takes_the_oldest_chain_and_its_tail_first():
    pool = PagePool(5)
    old, new = keys("old", 3), keys("new", 2)
    old_pages, new_pages = fill(pool, old), fill(pool, new)
    pool.release(old_pages)
    pool.release(new_pages)
    assert pool.allocate() == old_pages[2]
    assert pool.touch_prefix(old) == 2
    assert pool.allocate() == new_pages[1]
    assert pool.allocate() == new_pages[0]
    assert pool.acquire_prefix(old) == old_pages[:2]


def test_second_page_of_the_same_content_is_not_indexed():
    pool = PagePool(2)
    key = keys("a", 1)[0]
    first, second = pool.allocate(), pool.allocate()
    assert pool.publish(first, key)
    assert not pool.publish(second, key)
    pool.release([second])
    pool.release([first])
    assert pool.acquire_prefix([key]) == [first]
    pool.check_integrity([[first]])


def test_integrity_check_sees_leaks_and_double_releases():
    pool = PagePool(3)
    page = pool.allocate()
    with pytest.raises(RuntimeError, match="owners"):
        pool.check_integrity([])
    pool.check_integrity([[page]])
    pool.release([page])
    pool.release([page])
    with pytest.raises(RuntimeError):
        pool.check_integrity([])


def lend_to(landings):
    def landing_of(page):
        landings[page] = Landing(np.zeros((1, 2, 4), np.uint8))
        return landings[page]

    return landing_of


def test_lent_pages_go_to_whoever_needs_them_the_latest_first():
    pool, landings = PagePool(4), {}
    [owned] = fill(pool, keys("a", 1))
    loans = pool.lend(4, lend_to(landings))
    assert len(loans) == 3
    assert (pool.num_free, pool.num_lent) == (3, 3)
    pool.check_integrity([[owned]])
    assert pool.allocate() == loans[2].page
    assert landings[loans[2].page].is_withdrawn
    assert not landings[loans[0].page].is_withdrawn
    assert [pool.keep(loan) for loan in loans] == [True, True, False]
    assert all(landing.is_withdrawn for landing in landings.values())
    pool.check_integrity([[owned], [loan.page for loan in loans]])


def test_a_page_lent_again_is_not_the_former_borrowers():
    pool = PagePool(1)
    [first] = pool.lend(1, lambda page: None)
    pool.release([pool.allocate()])
    [second] = pool.lend(1, lambda page: None)
    assert first.page == second.page
    assert not pool.keep(first)
    assert pool.keep(second)
    pool.check_integrity([[0]])


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("arfplk"), st.integers(0, 7)), max_size=80))
def test_books_balance_after_any_history(history):
    pool = PagePool(6)
    tables: list[list[int]] = []
    loans: list[Loan] = []
    for action, number in history:
        if action == "a" and (page := pool.allocate()) is not None:
            tables.append([page])
        elif action == "p" and tables:
            page = tables[number % len(tables)][0]
            # A page is hashed once in its life: a second key would be another content.
            if page not in pool._key_of:
                pool.publish(page, keys("k", 8)[number])
        elif action == "f" and (pages := pool.acquire_prefix(keys("k", 8)[number:])):
            tables.append(pages)
        elif action == "l":
            loans += pool.lend(number % 3, lend_to({}))
        elif action == "k" and loans:
            loan = loans.pop(number % len(loans))
            if pool.keep(loan):
                tables.append([loan.page])
        elif action == "r" and tables:
            pool.release(tables.pop(number % len(tables)))
        pool.check_integrity(tables)
    assert pool.num_free == 6 - len({page for table in tables for page in table})
