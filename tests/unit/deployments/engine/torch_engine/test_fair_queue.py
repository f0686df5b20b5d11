"""The queue against its promises; the engine around it is a few lines of simulation."""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.torch_engine.fair_queue import (
    OUTPUT_TOKEN_COST,
    PROMPT_TOKEN_COST,
    FairQueue,
)


class Item(NamedTuple):
    session_id: int
    tenant: str = "a"
    priority: int = 0
    num_prompt_tokens: int = 10
    num_output_tokens: int = 10


class Server:
    """Runs up to ``num_places`` requests, a token each per step, and never idles."""

    def __init__(self, num_places: int) -> None:
        self.queue: FairQueue[Item] = FairQueue()
        self.num_places = num_places
        self.running: dict[Item, int] = {}
        self.service: Counter[str] = Counter()
        self.finished: list[Item] = []

    def charge(self, item, cost):
        self.queue.charge(item, cost)
        self.service[item.tenant] += cost

    def step(self):
        """Returns how many places did something."""
        while self.queue and len(self.running) < self.num_places:
            item = next(iter(self.queue))
            assert self.queue.remove(item)
            self.running[item] = item.num_output_tokens
            self.charge(item, PROMPT_TOKEN_COST * item.num_prompt_tokens)
        num_busy = len(self.running)
        for item in list(self.running):
            self.charge(item, OUTPUT_TOKEN_COST)
            self.running[item] -= 1
            if not self.running[item]:
                del self.running[item]
                self.finished.append(item)
        return num_busy


MAX_PROMPT, MAX_OUTPUT = 40, 12


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 4))
def test_backlogged_tenants_get_the_same_service_up_to_the_bound(seed, num_places, num_tenants):
    """Theorem of the paper, with others coming and going; and the server is never idle."""
    rng = random.Random(seed)  # noqa: S311
    server = Server(num_places)
    greedy, modest = "greedy", "modest"
    num_items = 0

    def arrive(tenant):
        nonlocal num_items
        num_items += 1
        # One tenant's requests are long, the other's short; it gains or loses nothing by that.
        scale = 1 if tenant == greedy else 3
        sizes = (rng.randint(1, MAX_PROMPT // scale), rng.randint(1, MAX_OUTPUT // scale))
        server.queue.push(Item(num_items, tenant, 0, *sizes))

    for step in range(200):
        if step >= 30 and rng.random() < 0.3:
            arrive(f"guest {rng.randrange(num_tenants)}")
        waiting = Counter(item.tenant for item in server.queue)
        for tenant, depth in ((greedy, 20), (modest, num_places + 1)):
            for _ in range(depth - waiting[tenant]):
                arrive(tenant)
        assert server.step() == num_places
        largest = max(PROMPT_TOKEN_COST * MAX_PROMPT, OUTPUT_TOKEN_COST * num_places * MAX_OUTPUT)
        assert abs(server.service[greedy] - server.service[modest]) <= 2 * largest


def test_a_flood_delays_a_newcomer_by_what_runs_and_no_more():
    server = Server(num_places=2)
    for number in range(500):
        server.queue.push(Item(number, "flood"))
    for _ in range(7):
        server.step()
    server.queue.push(Item(1000, "newcomer"))
    num_before = len(server.finished)
    while 1000 not in [item.session_id for item in server.finished]:
        server.step()
    assert len(server.finished) - num_before <= 2 + 2


def test_time_away_earns_no_credit():
    server = Server(num_places=1)
    for number in range(100):
        server.queue.push(Item(number, "busy"))
    for _ in range(300):
        server.step()
    for number in range(1000, 1100):
        server.queue.push(Item(number, "rested"))
    served = Counter()
    for _ in range(400):
        server.step()
    served.update(item.tenant for item in server.finished[30:])
    assert abs(served["busy"] - served["rested"]) <= 1


def test_no_credit_across_a_time_when_nobody_waits():
    server = Server(num_places=1)
    for number in range(20):
        server.queue.push(Item(number, "busy"))
    while server.queue or server.running:
        server.step()
    for number in range(100, 120):
        server.queue.push(Item(number, "rested"))
        server.queue.push(Item(100 + number, "busy"))
    before = len(server.finished)
    for _ in range(200):
        server.step()
    served = Counter(item.tenant for item in server.finished[before:])
    assert abs(served["busy"] - served["rested"]) <= 2


def test_the_order_is_class_then_returned_then_turns():
    queue: FairQueue[Item] = FairQueue()
    late, early = Item(8, "b", 1), Item(7, "c", 1)
    items = [Item(1, "a", 1), Item(2, "a", 1), Item(3, "b", 1), Item(4, "z", 0)]
    for item in items:
        queue.push(item)
    queue.put_back(late)
    queue.put_back(early)
    queue.charge(items[0], 5)
    assert list(queue) == [items[3], early, late, items[2], items[0], items[1]]
    assert len(queue) == 6
    assert queue.remove(early)
    assert not queue.remove(early)
    assert len(queue) == 5


@pytest.mark.parametrize(
    ("newcomer", "loser"),
    [
        (Item(9, "flood"), None),
        (Item(9, "some"), 4),
        (Item(9, "new"), 4),
        (Item(9, "flood", priority=-1), 4),
        (Item(9, "new", priority=1), None),
    ],
)
def test_who_leaves_a_full_queue(newcomer, loser):
    queue: FairQueue[Item] = FairQueue()
    for item in (*(Item(number, "flood") for number in range(5)), Item(5, "some"), Item(6, "some")):
        queue.push(item)
    queue.put_back(Item(7, "flood"))
    leaving = queue.first_to_leave(newcomer)
    assert (leaving.session_id if leaving else None) == loser


def test_equals_do_not_push_each_other_out():
    queue: FairQueue[Item] = FairQueue()
    for number in range(3):
        queue.push(Item(number, "a"))
        queue.push(Item(10 + number, "b"))
    assert queue.first_to_leave(Item(20, "a")) is None
    queue.push(Item(30, "a"))
    assert queue.first_to_leave(Item(20, "b")) is None
    assert queue.first_to_leave(Item(20, "c")) == Item(30, "a")
