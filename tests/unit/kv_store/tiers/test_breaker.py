import pytest

from kv_store.tiers.breaker import CircuitBreaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def breaker(clock):
    return CircuitBreaker(
        max_failures=3, open_s=1.0, max_open_s=4.0, clock=clock, jitter=lambda: 0.5
    )


def fail(breaker, times):
    for _ in range(times):
        assert breaker.allow()
        breaker.record_failure()


def test_opens_after_consecutive_failures_only(breaker):
    fail(breaker, 2)
    breaker.record_success()
    fail(breaker, 2)
    assert breaker.is_closed
    fail(breaker, 1)
    assert not breaker.is_closed
    assert breaker.is_blocking
    assert not breaker.allow()


def test_one_probe_after_the_wait_with_jitter(breaker, clock):
    fail(breaker, 3)
    clock.now += 1.24  # 1.0 s, stretched by half of the drawn 0.5
    assert not breaker.allow()
    clock.now += 0.02
    assert not breaker.is_blocking
    assert breaker.allow()
    assert not breaker.allow(), "only one probe at a time"
    breaker.record_success()
    assert breaker.is_closed
    assert breaker.allow()


def test_waits_double_up_to_the_bound_and_start_over_after_success(breaker, clock):
    fail(breaker, 3)
    for wait_s in (1.0, 2.0, 4.0, 4.0):
        clock.now += wait_s * 1.25 - 0.01
        assert not breaker.allow()
        clock.now += 0.02
        assert breaker.allow()
        breaker.record_failure()
    clock.now += 5.01
    assert breaker.allow()
    breaker.record_success()
    fail(breaker, 3)
    clock.now += 1.26
    assert breaker.allow()


def test_late_failures_do_not_prolong_the_wait(breaker, clock):
    assert all(breaker.allow() for _ in range(5))
    for _ in range(5):
        breaker.record_failure()
    clock.now += 1.26
    assert breaker.allow()


def test_a_probe_that_never_began_leaves_the_probing_to_the_next(breaker, clock):
    fail(breaker, 3)
    clock.now += 1.26
    assert breaker.allow()
    breaker.record_untried()
    assert not breaker.is_closed
    assert breaker.allow()
    breaker.record_success()
    assert breaker.is_closed


def test_operations_that_never_began_are_no_failures(breaker):
    for _ in range(5):
        assert breaker.allow()
        breaker.record_untried()
    fail(breaker, 2)
    assert breaker.is_closed
