import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.engine.speculation.fair_batch import FairBatches, Waiting, granted_fanout
from tests.fakes_speculation import query_of


def waiting_of(**num_questions):
    return {
        (tenant, number): Waiting(tenant, query_of(number, (1, 2)))
        for tenant, count in num_questions.items()
        for number in range(count)
    }


@pytest.mark.parametrize(
    ("fanout", "num_waiting", "granted"),
    [(3, 1, 3), (3, 16, 3), (3, 32, 1), (4, 32, 2), (1, 99, 1)],
)
def test_guesses_are_shed_before_sessions(fanout, num_waiting, granted):
    assert granted_fanout(fanout, num_waiting, 16) == granted


def test_what_fits_is_served_as_asked():
    waiting = waiting_of(many=3, few=1)
    assert FairBatches(4).choose(waiting) == dict.fromkeys(waiting, 2)


def test_one_tenant_alone_is_served_in_order_of_age():
    chosen = FairBatches(2).choose(waiting_of(only=5))
    assert list(chosen) == [("only", 0), ("only", 1)]


def test_a_tenant_with_one_session_never_waits_for_one_with_many():
    batches = FairBatches(4)
    for _ in range(100):
        chosen = batches.choose(waiting_of(many=50, one=1))
        assert chosen[("one", 0)] == 2
        assert len(chosen) == 4
        assert {fanout for (tenant, _), fanout in chosen.items() if tenant == "many"} == {1}


def test_tenants_with_many_sessions_share_evenly():
    batches = FairBatches(4)
    served = {"a": 0, "b": 0, "c": 0}
    for _ in range(60):
        for tenant, _ in batches.choose(waiting_of(a=50, b=20, c=10)):
            served[tenant] += 1
    assert max(served.values()) - min(served.values()) <= 2


def test_long_absence_earns_no_long_credit():
    batches = FairBatches(4)
    for _ in range(10_000):
        batches.choose(waiting_of(there=8))
    num_batches = 0
    while not any(tenant == "there" for tenant, _ in batches.choose(waiting_of(there=8, back=8))):
        num_batches += 1
        assert num_batches < 60


def test_tenants_that_left_are_forgotten():
    batches = FairBatches(4)
    for number in range(2_000):
        batches.choose(waiting_of(**{f"t{number}": 1}))
    assert len(batches._charged) < 500


@given(
    counts=st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=1),
    max_sessions=st.integers(1, 20),
)
def test_full_batches_without_strangers(counts, max_sessions):
    waiting = waiting_of(**counts)
    chosen = FairBatches(max_sessions).choose(waiting)
    assert len(chosen) == min(max_sessions, len(waiting))
    assert chosen.keys() <= waiting.keys()
    assert all(1 <= fanout <= 2 for fanout in chosen.values())
