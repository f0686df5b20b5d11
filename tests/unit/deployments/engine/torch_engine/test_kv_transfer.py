"""Pages shared between requests, tenants and replicas, and a tier that misbehaves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.engine.speculation.speculator import NoSpeculation
from tests.fakes_engine import (
    FakePageStore,
    HostileSpeculator,
    OracleSpeculator,
    expected,
    make_config,
    make_request,
)
from tests.unit.deployments.engine.torch_engine.test_core_text import Session

PROMPT = [(i * 7) % 60 for i in range(300)]


def run_one(session, session_id, request):
    session.add(session_id, request)
    session.run()
    assert tuple(session.tokens[session_id]) == expected(request).token_ids
    return session.ends[session_id].usage


def num_computed(session):
    return sum(session.parts.runner.batch_sizes)


def test_second_request_reuses_the_pages_of_the_first():
    session = Session()
    assert run_one(session, 1, make_request("a", PROMPT)).num_cached_tokens == 0
    before = num_computed(session)
    usage = run_one(session, 2, make_request("b", [*PROMPT[:200], 9, 9]))
    assert (usage.num_cached_tokens, usage.num_tier_cached_tokens) == (192, 0)
    # 202 prompt tokens less 192 cached, and 19 of the 20 output tokens.
    assert num_computed(session) - before == 10 + 19
    stats = session.core.stats()
    assert stats.num_local_cached_tokens == 192
    assert stats.num_prompt_tokens == 502
    assert stats.num_output_tokens == 40


def test_running_requests_share_pages():
    session = Session(make_config(num_pages=8))
    session.add(1, make_request("a", PROMPT[:256], max_tokens=30))
    session.step()
    session.step()
    session.add(2, make_request("b", PROMPT[:250], max_tokens=30))
    session.step()
    # 5 pages of the first; the second adds one to the three it shares.
    assert session.core.stats().num_free_pages == 8 - 5 - 1
    session.run()
    request = make_request("b", PROMPT[:250], max_tokens=30)
    assert tuple(session.tokens[2]) == expected_tokens(request)


def expected_tokens(request):
    return expected(request).token_ids


@pytest.mark.parametrize("length", [64, 128])
def test_last_prompt_token_is_always_computed(length):
    session = Session()
    run_one(session, 1, make_request("a", PROMPT[:length]))
    usage = run_one(session, 2, make_request("b", PROMPT[:length]))
    assert usage.num_cached_tokens == length - 64


def test_tenants_never_share_pages():
    store = FakePageStore()
    session = Session(store=store)
    run_one(session, 1, make_request("a", PROMPT, tenant_key=b"a" * 32))
    usage = run_one(session, 2, make_request("b", PROMPT, tenant_key=b"b" * 32))
    assert usage.num_cached_tokens == 0
    assert len({key.namespace_id for key in store.pages}) == 2


@pytest.mark.parametrize(
    "speculator", [NoSpeculation, OracleSpeculator, lambda: HostileSpeculator(1)]
)
def test_another_replica_reads_what_this_one_wrote(speculator):
    store = FakePageStore()
    writer = Session(store=store, speculator=speculator())
    run_one(writer, 1, make_request("a", PROMPT, max_tokens=100))
    # 300 prompt tokens and 99 output tokens have rows: six full pages, output included.
    assert len(store.pages) == 6
    reader = Session(store=store, speculator=speculator())
    usage = run_one(reader, 1, make_request("b", PROMPT, max_tokens=100))
    assert (usage.num_cached_tokens, usage.num_tier_cached_tokens) == (256, 256)
    assert reader.core.stats().num_tier_cached_tokens == 256
    assert reader.core.stats().num_local_cached_tokens == 0
    # What came from the tier is not written again; it is now in the pool and not asked for again.
    assert run_one(reader, 2, make_request("c", PROMPT)).num_tier_cached_tokens == 0
    assert len(store.pages) == 6


def test_continued_conversation_finds_its_output_pages():
    store = FakePageStore()
    first = make_request("a", PROMPT[:100], max_tokens=100)
    run_one(Session(store=store), 1, first)
    follow_up = [*PROMPT[:100], *expected(first).token_ids, 5, 6]
    usage = run_one(Session(store=store), 1, make_request("b", follow_up))
    assert usage.num_tier_cached_tokens == 192


@pytest.mark.parametrize(("answer", "num_cached"), [("short", 64), ("spoilt", 64), ("error", 0)])
def test_what_the_tier_fails_to_give_is_computed(answer, num_cached):
    store = FakePageStore()
    run_one(Session(store=store), 1, make_request("a", PROMPT))
    store.answer = answer
    session = Session(store=store)
    assert run_one(session, 1, make_request("b", PROMPT)).num_tier_cached_tokens == num_cached
    session.assert_all_free()


def test_an_aborted_load_may_write_nowhere():
    store = FakePageStore()
    run_one(Session(store=store), 1, make_request("a", PROMPT))
    store.answer = "held"
    session = Session(store=store)
    session.add(1, make_request("b", PROMPT))
    session.step()
    assert session.core.stats().num_free_pages == 32
    session.core.abort(1)
    ((_, _, into),) = store.pending
    assert all(landing.is_withdrawn for landing in into)
    session.collect()
    session.assert_all_free()


def test_slow_load_delays_nobody_else():
    store = FakePageStore()
    run_one(Session(store=store), 1, make_request("a", PROMPT))
    store.answer = "held"
    session = Session(store=store)
    session.add(1, make_request("slow", PROMPT))
    session.add(2, make_request("quick", [5] * 10))
    session.run()
    assert 2 in session.ends
    assert 1 not in session.ends
    assert session.core.stats().num_waiting == 1
    assert session.core.idle_s() == pytest.approx(1.5)
    store.release_loads()
    session.run()
    assert tuple(session.tokens[1]) == expected_tokens(make_request("slow", PROMPT))
    assert session.ends[1].usage.num_tier_cached_tokens == 256


def test_load_that_never_comes_is_given_up():
    store = FakePageStore(answer="held")
    session = Session(store=store)
    session.add(1, make_request("a", PROMPT))
    session.run()
    assert not session.ends
    session.now = 1.6
    session.run()
    assert tuple(session.tokens[1]) == expected_tokens(make_request("a", PROMPT))
    ((_, _, into),) = store.pending
    assert all(landing.is_withdrawn for landing in into)
    # Its late answer is nobody's any more.
    store.release_loads()
    session.run()
    session.assert_all_free()


def test_tier_pages_come_behind_local_ones():
    store = FakePageStore()
    run_one(Session(store=store), 1, make_request("a", PROMPT))
    session = Session(store=store)
    store.answer = "short"
    run_one(session, 1, make_request("b", PROMPT[:70]))
    store.answer = "at once"
    usage = run_one(session, 2, make_request("c", PROMPT))
    assert (usage.num_cached_tokens, usage.num_tier_cached_tokens) == (256, 192)


def test_loads_in_flight_never_exceed_the_pool():
    store = FakePageStore(answer="held")
    session = Session(make_config(num_pages=6), store=store)
    for session_id in range(1, 5):
        session.add(session_id, make_request(f"r{session_id}", [session_id] * 200))
    session.step()
    assert sum(len(load.keys) for load in session.core._transfer._loads) <= 6
    for now in (10.0, 20.0):
        session.now = now
        session.run()
    assert len(session.ends) == 4
    session.assert_all_free()


def test_full_pool_refuses_arrived_pages_without_harm():
    store = FakePageStore()
    run_one(Session(store=store), 1, make_request("a", PROMPT))
    store.answer = "held"
    session = Session(make_config(num_pages=6), store=store)
    session.add(1, make_request("slow", PROMPT))
    session.add(2, make_request("greedy", [9] * 10, max_tokens=370))
    for _ in range(330):
        session.step()
    ((_, _, into),) = store.pending
    assert all(landing.is_withdrawn for landing in into)
    store.release_loads()
    session.run()
    for session_id, request in (
        (1, make_request("slow", PROMPT)),
        (2, make_request("greedy", [9] * 10, max_tokens=370)),
    ):
        assert tuple(session.tokens[session_id]) == expected_tokens(request)
    session.assert_all_free()


def test_pages_of_bad_logits_are_not_cached():
    store = FakePageStore()
    session = Session(store=store)
    session.parts.runner.nan_after_token = PROMPT[100]
    session.add(1, make_request("a", PROMPT[:101]))
    session.run()
    assert not store.pages


def test_twin_pages_are_written_once():
    """The urgent one does not wait for pages of one that is not."""
    store = FakePageStore()
    session = Session(make_config(max_batch_tokens=128), store=store)
    session.add(1, make_request("a", PROMPT, priority=1))
    session.step()
    session.add(2, make_request("b", PROMPT, priority=0))
    session.run()
    assert session.ends[2].usage.num_cached_tokens == 128
    assert store.num_saves == len(store.pages) == 4


def test_one_load_serves_all_that_need_it():
    store = FakePageStore()
    run_one(Session(store=store), 1, make_request("a", PROMPT))
    store.answer = "held"
    session = Session(store=store)
    for session_id in range(1, 4):
        session.add(session_id, make_request(f"r{session_id}", PROMPT, choice_index=session_id))
    session.add(4, make_request("longer", [*PROMPT, *PROMPT]))
    session.step()
    assert len(store.pending) == 1
    store.release_loads()
    session.run()
    # Only the longer one has something left to ask for.
    assert len(store.pending) == 1
    store.release_loads()
    session.run()
    assert [session.ends[i].usage.num_cached_tokens for i in range(1, 5)] == [256] * 4
    # 300 tokens less 256, and 19 outputs, each time; the tier had no more for the longer one.
    assert num_computed(session) == 3 * (44 + 19) + 344 + 19


@pytest.mark.parametrize("ending", ["abort", "error", "timeout"])
def test_followers_do_not_depend_on_the_one_they_follow(ending):
    store = FakePageStore()
    run_one(Session(store=store), 1, make_request("a", PROMPT))
    store.answer = "held"
    session = Session(store=store)
    for session_id in (1, 2, 3):
        session.add(session_id, make_request(f"r{session_id}", PROMPT))
    session.step()
    if ending == "abort":
        session.core.abort(1)
        session.collect()
        session.run()
        store.release_loads()
        num_cached = 256
    elif ending == "error":
        ((future, _, _),) = store.pending
        future.set_exception(OSError("gone"))
        num_cached = 0
    else:
        session.now = 2.0
        num_cached = 0
    session.run()
    assert session.ends[3].usage.num_tier_cached_tokens == 0
    assert session.ends[2].usage.num_tier_cached_tokens == num_cached
    assert (
        tuple(session.tokens[2])
        == tuple(session.tokens[3])
        == expected_tokens(make_request("r", PROMPT))
    )
    session.assert_all_free()


def test_cached_tokens_are_prompt_tokens_only():
    store = FakePageStore()
    request = make_request("a", PROMPT[:100], max_tokens=100)
    run_one(Session(store=store), 1, request)
    session = Session(store=store)
    output = expected_tokens(request)
    session.add(1, replace(request, resumed_output_ids=output[:99]))
    session.run()
    assert tuple(session.tokens[1]) == output[99:]
    usage = session.ends[1].usage
    assert (usage.num_cached_tokens, usage.num_tier_cached_tokens) == (100, 100)
