"""A target replica as Serve's router sees it, with generations on direct streams.

Serve still chooses the replica, counts what it runs, and asks another one when this one is full or
gone. Only the way of the tokens differs: see ``token_server``. Whatever cannot go that way takes
Serve's: other methods, hidden states, replicas whose link is not up, and routers that run on an
event loop of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from deployments.engine.types import GenerationRequest
from deployments.serve_compat import (
    ReplicaQueueLengthInfo,
    ReplicaResult,
    RunningReplica,
    is_routed_here,
    replica_lost,
)
from deployments.token_link import LinkLostError, TokenLink

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.serve_compat import PendingRequest, RunningReplicaInfo
    from deployments.token_link import TokenStream

GENERATE = "generate"


class DirectReplica(RunningReplica):  # type: ignore[misc] # Ray ships no types
    """Used from the router's event loop."""

    def __init__(self, replica_info: RunningReplicaInfo) -> None:
        super().__init__(replica_info)
        self._link = TokenLink.of(self.replica_metadata)

    def try_send_request(self, pr: PendingRequest, with_rejection: bool) -> ReplicaResult:
        """Send a request; it may be rejected."""
        link = self._link
        if link is None or not with_rejection or not _can_go_directly(pr) or not link.is_open():
            return super().try_send_request(pr, with_rejection)
        return DirectResult(self, link.start(pr.args[0], self.max_ongoing_requests))

    async def get_queue_len(self, *, deadline_s: float) -> int:
        """Requests at the replica, as far as Serve and this side know."""
        others: int = await super().get_queue_len(deadline_s=deadline_s)
        return others + (self._link.num_open if self._link is not None else 0)


class DirectResult(ReplicaResult):  # type: ignore[misc]
    """A direct stream in the shape of Serve's results."""

    def __init__(self, replica: RunningReplica, stream: TokenStream) -> None:
        self._replica = replica
        self._stream = stream

    async def get_rejection_response(self) -> ReplicaQueueLengthInfo:
        """Whether the replica takes the request.

        Raises:
            ActorUnavailableError: it is gone.
        """
        try:
            admission = await self._stream.admission
        except LinkLostError as error:
            raise replica_lost(self._replica, str(error)) from None
        return ReplicaQueueLengthInfo(
            accepted=admission.is_accepted, num_ongoing_requests=admission.num_running
        )

    async def __anext__(self) -> Any:  # noqa: ANN401 - Serve's signature
        """Deltas that came together.

        Raises:
            ActorUnavailableError: the replica is gone.
        """
        try:
            return await self._stream.take()
        except LinkLostError as error:
            raise replica_lost(self._replica, str(error)) from None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Call back at the end."""
        self._stream.on_end(lambda: callback(None))

    def cancel(self) -> None:
        """End the sequence at the replica."""
        self._stream.cancel()

    def _unsupported(self, *_: object) -> NoReturn:
        raise TypeError("a direct stream can only be iterated, by the loop that routed it")

    get = get_async = __next__ = _unsupported
    to_object_ref = to_object_ref_async = to_object_ref_gen = _unsupported


def _can_go_directly(pr: PendingRequest) -> bool:
    return (
        pr.metadata.call_method == GENERATE
        and is_routed_here(pr)
        and isinstance(pr.args[0], GenerationRequest)
        and pr.args[0].capture is None
    )
