import pytest

from kv_store.moves import ExpiringPages, ReadCounts, worth_copying
from tests.kv_pages import make_chain, make_layout

KEYS = make_chain(make_layout(), 8)


@pytest.mark.parametrize(
    ("counts", "held", "expected"),
    [
        ("11111111", "........", [0, 1]),  # the head
        ("11121311", "........", [0, 1, 3, 5]),  # and what is read often
        ("11111111", "#.......", [1]),
        ("11111111", "..#..#..", [0, 1, 3, 4]),  # and the holes
        ("99999999", "########", []),
    ],
)
def test_what_is_worth_a_copy(counts, held, expected):
    is_held = [mark == "#" for mark in held]
    wanted = worth_copying(KEYS, [int(n) for n in counts], is_held, min_reads=2, head_pages=2)
    assert wanted == expected


def test_a_chain_that_begins_behind_the_head_has_none():
    assert worth_copying(KEYS[4:], [1] * 4, [False] * 4, min_reads=2, head_pages=4) == []


def test_reads_are_counted_for_the_pages_served_lately():
    counts = ReadCounts(2)
    assert [counts.add(KEYS[index]) for index in (0, 0, 1, 0, 2, 1)] == [1, 2, 1, 3, 1, 1]


def test_pages_are_given_out_when_they_are_due_and_once():
    pages = ExpiringPages(10)
    assert pages.next_due is None
    for index, due in enumerate([30.0, 10.0, 20.0]):
        pages.note(KEYS[index], due)
    assert pages.next_due == 10.0
    assert pages.take(9.0, 5) == []
    assert pages.take(25.0, 1) == [KEYS[1]]
    assert pages.take(25.0, 5) == [KEYS[2]]
    assert pages.take(99.0, 5) == [KEYS[0]]
    assert pages.next_due is None


def test_a_page_that_is_read_is_due_later_and_one_that_is_kept_never():
    pages = ExpiringPages(10)
    pages.note(KEYS[0], 10.0)
    pages.note(KEYS[1], 10.0)
    pages.note(KEYS[0], 40.0)
    pages.forget(KEYS[1])
    pages.forget(KEYS[2])
    assert pages.take(30.0, 5) == []
    assert pages.take(50.0, 5) == [KEYS[0]]
    pages.note(KEYS[1], 60.0)
    assert pages.take(60.0, 5) == [KEYS[1]]


def test_forgotten_pages_leave_their_places_to_others():
    pages = ExpiringPages(2)
    for _ in range(1000):
        for key in KEYS[:2]:
            pages.note(key, 10.0)
        for key in KEYS[:2]:
            pages.forget(key)
    assert len(pages._heap) <= 4
    for key in KEYS[2:4]:
        pages.note(key, 20.0)
    pages.note(KEYS[2], 30.0)
    assert pages.take(25.0, 9) == [KEYS[3]]
    assert pages.take(35.0, 9) == [KEYS[2]]
    assert pages.next_due is None


def test_no_more_is_noted_than_the_bound():
    pages = ExpiringPages(2)
    for index in range(4):
        pages.note(KEYS[index], 1.0)
    assert len(pages.take(2.0, 9)) == 2
