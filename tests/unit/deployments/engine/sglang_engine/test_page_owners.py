from __future__ import annotations

from deployments.engine.sglang_engine.page_owners import PageOwners, current_traceparent


def test_pages_belong_to_the_request_that_they_are_loaded_for():
    owners = PageOwners()
    owners.remember("r1", "one")
    owners.remember("r2", "two")
    assert current_traceparent() is None
    with owners.loading("r2"):
        assert current_traceparent() == "two"
    with owners.loading("r1"):
        assert current_traceparent() == "one"
    with owners.loading("r1"):
        assert current_traceparent() is None
    assert current_traceparent() is None


def test_the_oldest_requests_are_forgotten():
    owners = PageOwners(max_remembered=2)
    for number in range(3):
        owners.remember(f"r{number}", str(number))
    found = []
    for number in range(3):
        with owners.loading(f"r{number}"):
            found.append(current_traceparent())
    assert found == [None, "1", "2"]
