"""Everything of Ray Serve 2.60 that is private or younger than its stable API, in one place.

``tests/contract/test_serve_compat.py`` fails when an upgrade of Ray moves any of it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import grpc
from ray import serve
from ray.exceptions import (
    ActorUnavailableError,
    RayActorError,
    RayTaskError,
    TaskCancelledError,
)
from ray.serve._private.common import (
    ReplicaID,
    ReplicaQueueLengthInfo,
    RequestMetadata,
    RunningReplicaInfo,
)
from ray.serve._private.replica_result import ReplicaResult
from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve._private.request_router.request_router import RequestRouter
from ray.serve.context import _get_global_client
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    RequestCancelledError,
)
from ray.serve.schema import ServeDeploySchema

from deployments.engine.errors import EngineGoneError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager
    from typing import Any, Protocol

    class ReplicaSelection(Protocol):
        """A replica with one of its slots held."""

        replica_id: str
        replica_metadata: dict[str, Any]

    class ResponseStream(Protocol):
        """The items of a streaming handle call."""

        def __aiter__(self) -> AsyncIterator[Any]:
            """Items in order."""

        def cancel(self) -> None:
            """End the call at the replica."""

    class Handle(Protocol):
        """What is used of ``ray.serve.handle.DeploymentHandle``."""

        def options(self, **options: object) -> Handle:
            """The same deployment, called in another way."""

        def remote(self, *args: object) -> Any:  # noqa: ANN401 - a response or a stream
            """Start a call."""

        def choose_replica(self, *args: object) -> AbstractAsyncContextManager[ReplicaSelection]:
            """Hold a slot of one replica for as long as the context lasts."""


__all__ = [
    "ExactRequestRouter",
    "PendingRequest",
    "ReplicaID",
    "ReplicaQueueLengthInfo",
    "ReplicaResult",
    "RunningReplica",
    "RunningReplicaInfo",
    "apply_config",
    "current_replica_id",
    "is_cancelled",
    "is_deployment_failed",
    "is_queue_full",
    "is_replica_lost",
    "is_routed_here",
    "original_error",
    "replica_lost",
    "uses_tls",
]

_LOST_CODES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


class ExactRequestRouter(RequestRouter):  # type: ignore[misc] # Ray ships no types
    """Serve's base router, with every chosen replica given to the very call it was chosen for.

    The base class finds that call by its internal request id. Calls that one request makes at the
    same time (the choices of n > 1) inherit one id, so all but one of them would wait for ever.

    It also has a task of its own choose for every call, which takes longer than the choice. Here a
    call that finds nobody waiting, and the queues of its best candidates known, goes at once.
    """

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        if not is_retry and not self._is_anybody_waiting():
            ranks = await self.choose_replicas(self._replicas_list, pending_request)
            replica = self._free_replica(next(filter(None, ranks), []))
            if replica is not None:
                self._record_queue_wait_time(pending_request)
                return replica
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)

    def _is_anybody_waiting(self) -> bool:
        waiting = self._pending_requests_to_fulfill
        while waiting and waiting[0].future.done():
            waiting.popleft()
        return bool(waiting)

    def _free_replica(self, candidates: Sequence[RunningReplica]) -> RunningReplica | None:
        """The one with the shortest queue; None if a queue is not known, or all are full."""
        lengths = [self._replica_queue_len_cache.get(each.replica_id) for each in candidates]
        known = [(length, index) for index, length in enumerate(lengths) if length is not None]
        if not known or len(known) < len(lengths):
            return None
        length, index = min(known)
        return candidates[index] if length < candidates[index].max_ongoing_requests else None

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        for pending in self._pending_requests_to_fulfill:
            if pending.metadata is request_metadata and not pending.future.done():
                return pending
        return None


def apply_config(applications: list[dict[str, Any]]) -> None:
    """Deploy applications as a config file would; returns before their replicas run.

    Args:
        applications: the fields of ``ServeApplicationSchema``.
    """
    _get_global_client().deploy_apps(ServeDeploySchema(applications=applications))


def current_replica_id() -> str:
    """The unique part of the id of the replica this process is."""
    return str(serve.get_replica_context().replica_id.unique_id)


def uses_tls() -> bool:
    """Whether Ray encrypts what its processes say to each other."""
    return os.environ.get("RAY_USE_TLS", "0").lower() in {"1", "true"}


def original_error(error: Exception) -> Exception:
    """What a replica raised.

    Ray's own transport wraps it in an error of both types whose text is the remote traceback; the
    gRPC transport between replicas does not.
    """
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error


def is_replica_lost(error: BaseException) -> bool:
    """Whether a call failed because its replica is gone or goes, so that another one can take over.

    A dead replica shows as an actor error on Ray's own transport and as an unavailable channel on
    the gRPC transport between replicas.
    """
    if isinstance(error, TaskCancelledError):
        return False
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() in _LOST_CODES
    return isinstance(error, RayActorError | ReplicaUnavailableError | EngineGoneError)


def replica_lost(replica: RunningReplica, why: str) -> Exception:
    """What Serve's router and callers understand as the loss of a replica."""
    error: Exception = ActorUnavailableError(why, replica.actor_id.binary())
    return error


def is_routed_here(request: PendingRequest) -> bool:
    """Whether a call is routed by the event loop that waits for it."""
    return not request.metadata._on_separate_loop  # noqa: SLF001


def is_queue_full(error: BaseException) -> bool:
    """Whether Serve refused a call because replicas and their queue are full."""
    return isinstance(error, BackPressureError)


def is_cancelled(error: BaseException) -> bool:
    """Whether a call ended because it was cancelled from this side."""
    return isinstance(error, RequestCancelledError | TaskCancelledError)


def is_deployment_failed(error: BaseException) -> bool:
    """Whether the deployment called could not be brought up at all."""
    return isinstance(error, DeploymentUnavailableError)
