"""``grpc.health.v1`` over Serve: the inference service is up while a target replica answers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ray.serve.grpc_util import RayServegRPCContext

    from deployments.target_probe import TargetProbe

_SERVICES = frozenset({"", "paceline.v1.Inference", "grpc.health.v1.Health"})
_WATCH_PERIOD_S = 2.0


class HealthService:
    """Answers Check and Watch."""

    def __init__(self, probe: TargetProbe) -> None:
        self._probe = probe

    async def check(
        self, request: health_pb2.HealthCheckRequest, context: RayServegRPCContext
    ) -> health_pb2.HealthCheckResponse:
        """The state now; NOT_FOUND for a service that is not served here."""
        if request.service not in _SERVICES:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("unknown service")
            return health_pb2.HealthCheckResponse()
        return health_pb2.HealthCheckResponse(status=await self._status())

    async def watch(
        self, request: health_pb2.HealthCheckRequest
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The state, and again whenever it changes, until the client leaves."""
        last: int | None = None
        while True:
            status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            if request.service in _SERVICES:
                status = await self._status()
            if status != last:
                yield health_pb2.HealthCheckResponse(status=status)
                last = status
            await asyncio.sleep(_WATCH_PERIOD_S)

    async def _status(self) -> int:
        ready = await self._probe.is_ready()
        states = health_pb2.HealthCheckResponse
        return int(states.SERVING if ready else states.NOT_SERVING)
