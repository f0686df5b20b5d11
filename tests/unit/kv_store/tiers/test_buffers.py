import gc
import mmap
import threading

from kv_store.tiers.buffers import BufferPool


def address(view):
    import numpy as np

    return np.frombuffer(view, np.uint8).ctypes.data


def test_memory_comes_back_when_its_last_view_is_gone():
    pool = BufferPool()
    view = pool.take(100_000)
    first = address(view)
    part = view[5:10].toreadonly()
    del view
    gc.collect()
    assert address(pool.take(100_000)) != first
    del part
    gc.collect()
    assert address(pool.take(90_000)) == first


def test_buffers_in_use_never_overlap():
    pool = BufferPool()
    views = [pool.take(size) for size in (1, 4096, 70_000, 70_000, 1)]
    for number, view in enumerate(views):
        view[:] = bytes([number]) * len(view)
    assert [set(view) for view in views] == [{0}, {1}, {2}, {3}, {4}]
    assert all(address(view) % mmap.PAGESIZE == 0 for view in views)


def test_an_empty_buffer():
    assert bytes(BufferPool().take(0)) == b""


def idle_sizes(pool):
    return [len(memory) >> 16 for memories in pool._idle.values() for memory in memories]


def take_and_drop(pool, *sizes):
    views = [pool.take(size << 16) for size in sizes]
    del views
    gc.collect()


def test_no_more_than_the_limit_is_kept():
    pool = BufferPool(max_idle_bytes=3 << 16)
    take_and_drop(pool, *[1] * 8)
    assert idle_sizes(pool) == [1] * 3


def test_the_limit_is_of_all_sizes_and_those_used_last_are_kept():
    pool = BufferPool(max_idle_bytes=6 << 16)
    take_and_drop(pool, 1)
    take_and_drop(pool, 2)
    take_and_drop(pool, 3)
    assert idle_sizes(pool) == [1, 2, 3]
    take_and_drop(pool, 1)
    take_and_drop(pool, 1, 1)
    assert idle_sizes(pool) == [3, 1, 1]
    take_and_drop(pool, 9)
    assert idle_sizes(pool) == []
    take_and_drop(pool, 4)
    assert idle_sizes(pool) == [4]


def test_a_view_that_dies_while_the_pool_is_at_work_is_not_lost():
    pool = BufferPool()
    view = pool.take(1)
    with pool._lock:  # as the collector may find it
        del view
        gc.collect()
    take_and_drop(pool, 2)
    assert sorted(idle_sizes(pool)) == [1, 2]


def test_threads_share_a_pool():
    pool = BufferPool(max_idle_bytes=2 << 16)
    wrong = []

    def work(number):
        for _ in range(300):
            view = pool.take(5000)
            view[:] = bytes([number]) * 5000
            if bytes(view) != bytes([number]) * 5000:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool._num_idle_bytes == sum(idle_sizes(pool)) << 16 <= 2 << 16
    assert not pool._returned
