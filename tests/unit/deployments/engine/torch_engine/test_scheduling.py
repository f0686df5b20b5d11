"""Who runs when: fairness, shared prompts, chunks, preemption, and what all of it costs."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from deployments.engine.errors import EngineOverloadedError
from deployments.engine.types import FinishReason
from tests.fakes_engine import OracleSpeculator, expected, make_config, make_request
from tests.unit.deployments.engine.torch_engine.test_core_text import Session

PROMPT = [(i * 7) % 60 for i in range(300)]


def num_computed(session):
    return sum(session.parts.runner.batch_sizes)


def assert_texts(session, requests):
    for session_id, request in requests.items():
        assert tuple(session.tokens[session_id]) == expected(request).token_ids


def steps_until(session, session_id, limit=500):
    for step in range(limit):
        if session.tokens[session_id]:
            return step
        session.step()
    raise AssertionError("no token came")


@pytest.mark.parametrize("max_batch_tokens", [64, 128, 512])
def test_choices_of_one_request_compute_its_pages_once(max_batch_tokens):
    session = Session(make_config(max_batch_tokens=max_batch_tokens, max_num_seqs=4))
    requests = {
        number: make_request(f"r{number}", PROMPT, choice_index=number, temperature=1.0)
        for number in range(1, 5)
    }
    for session_id, request in requests.items():
        session.add(session_id, request)
    session.run()
    assert_texts(session, requests)
    # Four pages once, the 44 tokens behind them and 19 outputs by each.
    assert num_computed(session) == 256 + 4 * (44 + 19)
    cached = sorted(session.ends[number].usage.num_cached_tokens for number in requests)
    assert cached == [0, 256, 256, 256]


def test_requests_with_one_system_prompt_compute_it_once():
    session = Session(make_config(num_pages=64))
    requests = {i: make_request(f"r{i}", [*PROMPT[:200], *[i] * 90]) for i in range(1, 7)}
    for session_id, request in requests.items():
        session.add(session_id, request)
    session.run()
    assert_texts(session, requests)
    assert num_computed(session) == 192 + 6 * (98 + 19)


def test_others_do_not_wait_for_those_that_wait_for_a_page():
    session = Session(make_config(max_batch_tokens=64, max_num_seqs=3))
    for number in range(1, 7):
        session.add(number, make_request(f"r{number}", PROMPT, choice_index=number))
    session.add(7, make_request("other", [5] * 10))
    # The others' prompt takes five steps.
    assert steps_until(session, 7) <= 2
    session.run()


@pytest.mark.parametrize("leaves", ["abort", "deadline", "preempted"])
def test_a_page_that_will_not_come_is_computed_by_whoever_waited(leaves):
    session = Session(make_config(max_batch_tokens=64, num_pages=12, max_num_seqs=3))
    deadline = 5.0 if leaves == "deadline" else None
    session.add(1, make_request("old", [1] * 60, max_tokens=150))
    session.step()
    session.add(2, make_request("leader", PROMPT, deadline=deadline))
    session.add(3, make_request("follower", PROMPT))
    session.step()
    session.step()
    assert session.core.stats().num_waiting == 1
    if leaves == "abort":
        session.core.abort(2)
        session.collect()
    elif leaves == "deadline":
        session.now = 5.0
    else:
        session.add(4, make_request("urgent", [9] * 450, priority=-1))
        session.step()
        assert session.core.stats().num_preemptions == 1
    session.run()
    assert_texts(session, {3: make_request("follower", PROMPT)})
    if leaves == "preempted":
        assert_texts(session, {2: make_request("leader", PROMPT)})
    session.assert_all_free()


def test_a_short_prompt_does_not_wait_for_long_ones():
    session = Session(make_config(max_batch_tokens=64, num_pages=64))
    long_ones = {i: make_request(f"long{i}", [i] * 900, max_tokens=3) for i in range(1, 4)}
    for session_id, request in long_ones.items():
        session.add(session_id, request)
    session.step()
    session.add(9, make_request("short", [9] * 60))
    # Half of each step's 64 rows is the long one's.
    assert steps_until(session, 9) == 2
    # A stream of short ones slows the first long one down by two, and does not stop it.
    for session_id in range(10, 70):
        session.add(
            session_id, make_request(f"s{session_id}", [session_id % 60] * 40, max_tokens=1)
        )
    assert steps_until(session, 1) <= 900 // 32
    session.run()
    assert_texts(session, long_ones)


def test_a_flood_does_not_keep_another_tenant_waiting():
    session = Session(make_config(max_num_seqs=2, max_waiting=100, num_pages=16))
    for number in range(1, 60):
        session.add(number, make_request(f"f{number}", [number] * 30, tenant="flood"))
    for _ in range(30):
        session.step()
    session.add(100, make_request("one", [7] * 30, tenant="modest"))
    session.add(101, make_request("two", [8] * 30, tenant="modest"))
    num_before = len(session.ends)
    while 101 not in session.ends:
        session.step()
    # The two that ran, and at most one more beside each of the other tenant's.
    assert len(set(session.ends) - {100, 101}) - num_before <= 4
    session.run()
    assert len(session.ends) == 61


def test_a_flood_does_not_fill_the_queue_for_others():
    session = Session(make_config(max_num_seqs=2, max_waiting=10))
    for number in range(1, 30):
        session.add(number, make_request(f"f{number}", tenant="flood"))
    refused = [number for number, end in session.ends.items() if end]
    assert refused == list(range(13, 30))
    for number in range(30, 36):
        session.add(number, make_request(f"m{number}", tenant="modest"))
    assert not set(session.ends) & set(range(30, 36))
    # Both have six now: nobody is better off by asking more.
    for number, tenant in ((40, "modest"), (41, "flood")):
        session.add(number, make_request(f"x{number}", tenant=tenant))
        assert isinstance(session.ends[number], EngineOverloadedError)
    session.run()
    kinds = Counter(type(end) for end in session.ends.values())
    assert kinds[EngineOverloadedError] == 17 + 6 + 2
    assert len(session.ends) == 37
    # Whoever came first was not the one to leave.
    assert all(session.ends[number].finish_reason is FinishReason.LENGTH for number in range(1, 7))


def test_what_has_been_read_in_part_is_not_refused_later():
    session = Session(make_config(max_num_seqs=1, max_waiting=2))
    whole = expected(make_request()).token_ids
    for number in range(1, 4):
        session.add(number, make_request(f"r{number}", resumed_output_ids=whole[:5]))
    session.add(4, make_request("new", tenant="other"))
    assert isinstance(session.ends[4], EngineOverloadedError)
    session.run()
    assert all(tuple(session.tokens[number]) == whole[5:] for number in (1, 2, 3))


@pytest.mark.parametrize("scarce", ["places", "pages"])
def test_an_urgent_request_takes_the_place_of_a_less_urgent_one(scarce):
    sizes = {"max_num_seqs": 2} if scarce == "places" else {"num_pages": 8}
    session = Session(make_config(**sizes), OracleSpeculator())
    requests = {i: make_request(f"r{i}", [i] * 200, priority=5, max_tokens=40) for i in (1, 2)}
    for session_id, request in requests.items():
        session.add(session_id, request)
    for _ in range(6):
        session.step()
    requests[3] = make_request("urgent", [3] * 100, priority=1, max_tokens=40)
    session.add(3, requests[3])
    session.step()
    assert session.tokens[3]
    assert session.core.stats().num_preemptions == 1
    session.run()
    assert list(session.ends).index(3) < list(session.ends).index(2)
    assert_texts(session, requests)
    session.assert_all_free()


def test_nobody_is_preempted_for_an_urgent_request_that_would_not_fit_anyway():
    session = Session(make_config(num_pages=8))
    session.add(1, make_request("equal", [1] * 300, priority=1, max_tokens=30))
    session.add(2, make_request("less", [2] * 60, priority=5, max_tokens=30))
    for _ in range(4):
        session.step()
    session.add(3, make_request("urgent", [3] * 400, priority=1))
    session.step()
    assert session.core.stats().num_preemptions == 0
    session.run()
    assert len(session.ends) == 3


def test_nobody_yields_whose_pages_stay_with_others():
    session = Session(make_config(num_pages=24, max_num_seqs=16, max_batch_tokens=512))
    session.add(1, make_request("equal", [1] * 640, priority=1, max_tokens=60))
    for number in range(2, 8):  # choices of one request share the pages of its prompt
        choice = make_request(f"choice{number}", PROMPT, choice_index=number, priority=5)
        session.add(number, choice)
    for _ in range(6):
        session.step()
    assert session.core.stats().num_running == 7
    session.add(8, make_request("urgent", [3] * 1000, priority=1))
    session.step()
    assert session.core.stats().num_preemptions == 0
    session.run()
    assert len(session.ends) == 8


def test_who_has_yielded_does_not_come_back_while_the_urgent_one_waits():
    session = Session(make_config(num_pages=62, max_num_seqs=8, max_batch_tokens=64))
    session.add(1, make_request("yields", [2] * 70, priority=5, max_tokens=200, ignore_eos=True))
    for _ in range(8):
        session.step()
    session.add(2, make_request("long", [1] * 1900, priority=1, max_tokens=20))
    session.step()
    session.add(3, make_request("longer", [3] * 1950, priority=1, max_tokens=20))
    session.run()
    assert session.core.stats().num_preemptions <= 2
    assert len(session.ends) == 3


@pytest.mark.parametrize("seed", [1, 2])
def test_overload_wastes_little(seed):
    """Far more requests than pages allow: counters, not time, show that it does not thrash."""
    rng = random.Random(seed)  # noqa: S311
    session = Session(make_config(num_pages=12, max_num_seqs=16, max_waiting=200))
    requests = {
        number: make_request(
            f"r{number}",
            rng.choices(range(60), k=rng.randint(10, 120)),
            max_tokens=rng.randint(10, 250),
            tenant=rng.choice("ab"),
        )
        for number in range(1, 30)
    }
    for session_id, request in requests.items():
        session.add(session_id, request)
        session.step()
    session.run()
    stats = session.core.stats()
    useful = sum(len(r.prompt_token_ids) + r.sampling.max_tokens - 1 for r in requests.values())
    assert num_computed(session) == useful + stats.num_recomputed_tokens
    assert 0 < stats.num_preemptions < len(requests)
    assert stats.num_recomputed_tokens < 0.1 * useful
    # And the pages were put to use: they hold about four sequences of the mean length.
    assert stats.num_output_tokens / stats.num_steps > 3
