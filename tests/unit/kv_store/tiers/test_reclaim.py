import pytest

from kv_store.tiers.reclaim import Queue, ReclaimPolicy
from tests.bench.kv.eviction import LeastRecentlyUsed, SimulatedLog, Unbounded
from tests.bench.kv.trace import TRACE, measure, read_trace, replay
from tests.kv_pages import make_chain, make_layout

KEYS = make_chain(make_layout(), 40)


def filled(*, budget=8, segment=2, num_pages=8):
    """One page of one byte after the other, in segments of probation."""
    policy = ReclaimPolicy(budget_bytes=budget, segment_bytes=segment)
    for index in range(num_pages):
        if index % segment == 0:
            policy.begin(index // segment, Queue.PROBATION)
        policy.wrote(index // segment, KEYS[index], 1)
    return policy


def test_an_empty_log_has_no_victim():
    assert ReclaimPolicy(budget_bytes=8, segment_bytes=2).victim() is None


def test_what_was_not_read_leaves_with_its_segment_and_is_remembered():
    policy = filled()
    assert (policy.num_bytes, policy.victim()) == (8, 0)
    assert policy.survivors(0) == []
    assert policy.forget(0) == KEYS[:2]
    assert policy.num_bytes == 6
    assert [policy.queue_for(key) for key in KEYS[:3]] == [Queue.MAIN] * 2 + [Queue.PROBATION]


def test_what_was_read_survives_the_last_read_first_up_to_half_a_segment():
    policy = filled(segment=4)
    for index in (0, 2):
        policy.read(KEYS[index])
    policy.wrote(1, KEYS[9], 1)
    policy.read(KEYS[3])
    policy.read(KEYS[30])  # not here
    assert policy.survivors(0) == [KEYS[3], KEYS[0]]


def test_a_use_counts_for_three_quarters_of_a_budget_of_writes():
    policy = filled(num_pages=2)
    policy.read(KEYS[0])
    policy.begin(1, Queue.PROBATION)
    for index in range(2, 8):
        policy.wrote(1, KEYS[index], 1)
    assert policy.survivors(0) == [KEYS[0]]
    policy.wrote(1, KEYS[8], 1)
    assert policy.survivors(0) == []


def test_a_page_that_moved_does_not_leave_with_its_old_segment():
    policy = filled()
    policy.read(KEYS[1])
    policy.begin(9, Queue.MAIN)
    for key in policy.survivors(0):
        policy.wrote(9, key, 1)
    assert policy.forget(0) == [KEYS[0]]
    assert policy.num_bytes == 7


def test_the_main_queue_gives_way_where_probation_has_less_than_its_share():
    policy = filled(num_pages=3)
    policy.begin(8, Queue.MAIN)
    for index in range(10, 15):
        policy.wrote(8, KEYS[index], 1)
    assert policy.victim() == 8
    policy.wrote(1, KEYS[3], 1)
    assert policy.victim() == 0
    for segment in (0, 1):
        policy.forget(segment)
    assert policy.victim() == 8
    policy.forget(8)
    assert policy.queue_for(KEYS[10]) is Queue.PROBATION, "only probation is remembered"


def test_deleted_pages_are_neither_moved_nor_remembered_and_keep_their_room():
    policy = filled()
    policy.read(KEYS[0])
    policy.deleted(KEYS[0])
    assert policy.num_bytes == 8
    assert policy.survivors(0) == []
    assert policy.forget(0) == [KEYS[1]]
    assert policy.queue_for(KEYS[0]) is Queue.PROBATION


def test_no_more_is_remembered_than_the_budget_could_hold():
    policy = ReclaimPolicy(budget_bytes=3, segment_bytes=1)
    for index in range(5):
        policy.begin(index, Queue.PROBATION)
        policy.wrote(index, KEYS[index], 1)
        policy.forget(index)
    remembered = [policy.queue_for(key) is Queue.MAIN for key in KEYS[:6]]
    assert remembered == [False, False, True, True, True, False]
    policy.begin(7, Queue.MAIN)
    policy.wrote(7, KEYS[4], 1)
    assert policy.queue_for(KEYS[4]) is Queue.PROBATION


def test_a_disk_that_is_full_is_the_budget_until_it_has_room_again():
    policy = filled(budget=1000, segment=100, num_pages=0)
    policy.begin(0, Queue.PROBATION)
    policy.wrote(0, KEYS[0], 50)
    policy.shrink()
    assert policy.is_cramped
    assert (policy.budget_bytes, policy.segment_bytes) == (40, 20), "a fifth is for what moves"
    policy.grow(0)
    assert policy.budget_bytes == 40
    policy.grow(550)
    assert (policy.budget_bytes, policy.segment_bytes) == (550, 100), "half a segment is enough"
    policy.grow(5)
    assert policy.budget_bytes == 550, "what is freed may take a while to be free"
    policy.grow(5000)
    assert policy.budget_bytes == 1000
    assert not policy.is_cramped


def test_lru_forgets_what_was_used_least_lately():
    cache = LeastRecentlyUsed(2)
    cache.write(1)
    cache.write(2)
    assert cache.read(1)
    cache.write(2)
    cache.write(3)
    assert [cache.read(name) for name in (1, 2, 3)] == [True, False, True]


def test_prompts_of_a_trace_are_read_and_give_what_they_share():
    prompts = read_trace(["1500: 0+3\n", "1600: 0+2 7+2\n", "1000: 0 8\n"])
    assert [prompt.blocks for prompt in prompts] == [(0, 1, 2), (0, 1, 7, 8), (0, 8)]
    assert replay(prompts, Unbounded()) == (1024 + 1000) / 4100


@pytest.mark.parametrize("num_blocks", [64, 640])
def test_a_scan_does_not_wash_out_what_is_used(num_blocks):
    """Blocks asked for again and again, among blocks that are never asked for twice."""
    log, lru = SimulatedLog(num_blocks, num_blocks // 32), LeastRecentlyUsed(num_blocks)
    num_used = num_blocks // 4
    hits = {log: 0, lru: 0}
    for round_ in range(40):
        for cache in (log, lru):
            for name in range(num_used):
                hits[cache] += cache.read(name)
                cache.write(name)
            for name in range(num_blocks):
                cache.write(num_used + round_ * num_blocks + name)
    assert hits[lru] == 0
    assert hits[log] > 0.8 * 40 * num_used


def test_the_beginning_of_the_public_trace_gives_what_its_bound_allows():
    with TRACE.open(encoding="utf-8") as lines:
        prompts = read_trace(lines)
    assert (len(prompts), sum(prompt.num_tokens for prompt in prompts)) == (12031, 144_793_823)
    report = measure(prompts[:1000], (0.1, 0.8, 1.0))
    small, large, whole = report["sizes"]
    assert small["lru"] < small["hit_rate"] < large["hit_rate"] < whole["hit_rate"]
    assert whole["hit_rate"] == whole["bound"]
    assert large["bound"] - large["hit_rate"] < 0.02
