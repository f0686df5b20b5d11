import threading

import numpy as np

from kv_store.write_back import PendingWrite, WriteBackQueue
from tests.kv_pages import make_chain, make_layout

KEYS = make_chain(make_layout(), 6)


def writes(sizes):
    return [
        PendingWrite(key, np.zeros(size, np.uint8)) for key, size in zip(KEYS, sizes, strict=False)
    ]


def test_bounded_by_pages_until_they_are_finished():
    queue = WriteBackQueue(max_pages=2, max_bytes=100)
    first, second, third = writes([1, 1, 1])
    assert queue.put(first)
    assert queue.put(second)
    assert not queue.put(third)
    [taken] = queue.take(1)
    assert taken is first
    assert not queue.put(third), "a page being written still holds memory"
    queue.finish([taken])
    assert queue.put(third)
    assert (queue.num_dropped, queue.num_queued) == (2, 2)


def test_bounded_by_bytes():
    queue = WriteBackQueue(max_pages=9, max_bytes=10)
    large, small, small_too = writes([8, 2, 1])
    assert queue.put(large)
    assert queue.put(small)
    assert not queue.put(small_too)
    queue.finish(queue.take(1))
    assert queue.put(small_too)
    assert queue.num_dropped == 1


def test_a_page_is_queued_once():
    queue = WriteBackQueue(max_pages=1, max_bytes=10)
    [write] = writes([5])
    assert queue.put(write)
    assert queue.put(write)
    assert len(queue.take(9)) == 1
    assert queue.num_dropped == 0


def test_waiting_ends_when_the_last_page_is_finished():
    queue = WriteBackQueue(max_pages=9, max_bytes=100)
    assert queue.wait_until_empty(0)
    for write in writes([1, 1]):
        queue.put(write)
    taken = queue.take(9)
    assert not queue.wait_until_empty(0)
    finisher = threading.Thread(target=queue.finish, args=(taken,))
    finisher.start()
    assert queue.wait_until_empty(10)
    finisher.join()
