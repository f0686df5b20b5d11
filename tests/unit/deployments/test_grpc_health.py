from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2

from deployments import grpc_health
from deployments.grpc_health import HealthService

if TYPE_CHECKING:
    import pytest

REQUEST = health_pb2.HealthCheckRequest(service="paceline.v1.Inference")
SERVING = health_pb2.HealthCheckResponse.SERVING


class Probe:
    async def is_ready(self) -> bool:
        return True


class Context:
    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        assert details


async def test_a_watch_ends_with_a_status_after_which_clients_ask_again() -> None:
    context = Context()
    async with (
        asyncio.timeout(60),
        aclosing(HealthService(Probe(), watch_for_s=0.01).watch(REQUEST, context)) as states,
    ):
        assert [state.status async for state in states] == [SERVING]
    assert context.code is grpc.StatusCode.UNAVAILABLE


async def test_no_more_clients_watch_than_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_health, "_MAX_WATCHING", 2)
    service = HealthService(Probe())
    async with AsyncExitStack() as open_watches:
        for _ in range(2):
            states = await open_watches.enter_async_context(
                aclosing(service.watch(REQUEST, Context()))
            )
            assert (await anext(states)).status == SERVING
        context = Context()
        # No state came, so the client waits before it asks again.
        assert [state async for state in service.watch(REQUEST, context)] == []
        assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with aclosing(service.watch(REQUEST, Context())) as states:
        assert (await anext(states)).status == SERVING
