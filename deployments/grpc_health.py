"""``grpc.health.v1`` over Serve: the inference service is up while a target replica answers."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ray.serve.grpc_util import RayServegRPCContext

    from deployments.target_probe import TargetProbe

_SERVICES = frozenset({"", "paceline.v1.Inference", "grpc.health.v1.Health"})
_WATCH_PERIOD_S = 2.0
_WATCH_FOR_S = 15.0
"""Less than an ingress replica has to drain: it goes once its last stream has ended."""
_MAX_WATCHING = 64
"""Streams need no key and hold places of requests; the autoscaling policy counts them as such."""


class HealthService:
    """Answers Check and Watch.

    Args:
        probe: what is told.
        watch_for_s: seconds after which a Watch ends.
    """

    def __init__(self, probe: TargetProbe, watch_for_s: float = _WATCH_FOR_S) -> None:
        self._probe = probe
        self._watch_for_s = watch_for_s
        self._num_watching = 0

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
        self, request: health_pb2.HealthCheckRequest, context: RayServegRPCContext
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The state, and again whenever it changes, until the client leaves or is to ask again.

        Clients ask again after any status but UNIMPLEMENTED, and later if no state came before it.
        """
        if self._num_watching >= _MAX_WATCHING:
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            context.set_details("too many clients watch this replica")
            return
        ends_at = time.monotonic() + self._watch_for_s
        last: int | None = None
        self._num_watching += 1
        try:
            while (left_s := ends_at - time.monotonic()) > 0:
                status = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                if request.service in _SERVICES:
                    status = await self._status()
                if status != last:
                    yield health_pb2.HealthCheckResponse(status=status)
                    last = status
                await asyncio.sleep(min(_WATCH_PERIOD_S, left_s))
        finally:
            self._num_watching -= 1
        context.set_code(grpc.StatusCode.UNAVAILABLE)
        context.set_details("watch again")

    async def _status(self) -> int:
        ready = await self._probe.is_ready()
        states = health_pb2.HealthCheckResponse
        return int(states.SERVING if ready else states.NOT_SERVING)
