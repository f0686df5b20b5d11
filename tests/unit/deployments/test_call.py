from __future__ import annotations

import time

import pytest
from pydantic import SecretStr

from deployments.admission import AdmissionGate
from deployments.call import AVOID_HEADER, TIMEOUT_HEADER, CallGuard
from deployments.config import AuthConfig, IngressConfig, TenantConfig, TracingConfig
from deployments.errors import AuthenticationError, RateLimitedError, RequestInvalidError
from deployments.tenants import TenantDirectory
from deployments.tracing import Tracing

AUTH = AuthConfig(
    cluster_secret=SecretStr("a cluster secret of some length"),
    tenants=(
        TenantConfig(name="one", api_keys=(SecretStr("k1"),), max_concurrent_requests=1),
        TenantConfig(name="two", api_keys=(SecretStr("k2"),), priority=3),
    ),
)
ONE, TWO = {"authorization": "Bearer k1"}, {"authorization": "Bearer k2"}


def guard(auth: AuthConfig = AUTH, *, max_concurrent: int = 3) -> tuple[CallGuard, AdmissionGate]:
    config = IngressConfig(
        max_concurrent_requests=max_concurrent, default_timeout_s=50, max_timeout_s=100
    )
    gate = AdmissionGate(max_concurrent)
    tracing = Tracing(TracingConfig(), "test")
    return CallGuard(config, TenantDirectory(auth), gate, tracing, "m"), gate


def test_the_place_is_given_back_however_the_call_ends() -> None:
    calls, gate = guard()
    in_flight: list[int] = []

    def fail() -> None:
        with calls.call("http", "chat", ONE):
            in_flight.append(gate.num_in_flight)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert in_flight == [1]
    assert gate.num_in_flight == 0


def test_a_tenant_at_its_bound_leaves_room_for_others() -> None:
    calls, _ = guard()
    with calls.call("http", "chat", ONE):
        with pytest.raises(RateLimitedError, match="'one'"), calls.call("http", "chat", ONE):
            pass
        with calls.call("grpc", "chat", TWO) as context:
            assert (context.tenant.name, context.tenant.priority) == ("two", 3)


def test_a_tenant_at_its_bound_is_told_so_by_a_full_ingress_too() -> None:
    calls, _ = guard(max_concurrent=1)
    with (
        calls.call("http", "chat", ONE),
        pytest.raises(RateLimitedError, match="'one'"),
        calls.call("http", "chat", ONE),
    ):
        pass


def test_the_ingress_has_a_bound_of_its_own() -> None:
    calls, gate = guard(max_concurrent=1)
    with (
        calls.call("http", "chat", TWO),
        pytest.raises(RateLimitedError),
        calls.call("http", "chat", TWO),
    ):
        pass
    assert gate.num_in_flight == 0


def test_a_stranger_takes_no_place() -> None:
    calls, gate = guard()
    with pytest.raises(AuthenticationError), calls.call("http", "chat", {}):
        pass
    assert gate.num_in_flight == 0


@pytest.mark.parametrize(
    ("header", "seconds"), [(None, 50), ("10", 10), ("0.5", 0.5), ("1e6", 100)]
)
def test_the_deadline(header: str | None, seconds: float) -> None:
    calls, _ = guard(AuthConfig())
    headers = {} if header is None else {TIMEOUT_HEADER: header}
    before = time.time()
    with calls.call("http", "chat", headers) as context:
        assert before + seconds <= context.deadline <= time.time() + seconds


@pytest.mark.parametrize("header", ["0", "-1", "soon", "nan", "inf", ""])
def test_a_senseless_deadline_is_refused(header: str) -> None:
    calls, gate = guard(AuthConfig())
    with (
        pytest.raises(RequestInvalidError) as caught,
        calls.call("http", "chat", {TIMEOUT_HEADER: header}),
    ):
        pass
    assert caught.value.param == TIMEOUT_HEADER
    assert gate.num_in_flight == 0


def test_replicas_to_avoid() -> None:
    calls, _ = guard(AuthConfig())
    with calls.call("http", "chat", {AVOID_HEADER: "a, b,,"}) as context:
        assert context.avoid_replicas == ("a", "b")
