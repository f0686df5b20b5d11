"""Routes a request to the target replica that holds its prompt's beginning, unless it is busy."""

from __future__ import annotations

import logging
import random
import time
from typing import TYPE_CHECKING

from deployments.direct_replica import DirectReplica
from deployments.engine.embedding import EmbeddingRequest
from deployments.engine.prefixes import prefix_names, read_report
from deployments.engine.types import GenerationRequest
from deployments.ping import Ping
from deployments.prefix_affinity import PrefixAffinity
from deployments.serve_compat import ExactRequestRouter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.engine.prefixes import HeldPrefixes
    from deployments.serve_compat import (
        PendingRequest,
        ReplicaID,
        RunningReplica,
        RunningReplicaInfo,
    )

TextRequest = GenerationRequest | EmbeddingRequest
"""What carries a prompt, hence has a replica that may hold its beginning."""

logger = logging.getLogger(__name__)


class PrefixAwareRouter(ExactRequestRouter):
    """Prefix affinity, bounded by load; otherwise the shorter queue of two random replicas.

    A replica's engine may report which prefixes it holds (``record_routing_stats``); of others the
    router knows what it sent them.

    A replica named in a request's ``avoid_replicas`` is chosen only when no other one could be had
    for ``avoid_grace_s``: it failed this request, or an operator asked for another.
    """

    def initialize_state(
        self,
        *,
        capacity: int = 65536,
        max_queue_excess: int = 4,
        avoid_grace_s: float = 2.0,
        unconfirmed_s: float = 30.0,
    ) -> None:
        """Take ``RequestRouterConfig.request_router_kwargs``.

        Args:
            capacity: prompt prefixes remembered.
            max_queue_excess: the cached replica is left for another once its queue is longer
                than the shortest by more than this.
            avoid_grace_s: seconds a request waits for a replica it does not avoid.
            unconfirmed_s: seconds that a prompt's way is remembered where the replica reports what
                it holds and has not reported this one.
        """
        self._affinity = PrefixAffinity(capacity, unconfirmed_s=unconfirmed_s)
        self._reports: dict[str, tuple[Mapping[str, object], HeldPrefixes | None]] = {}
        self._max_queue_excess = max_queue_excess
        self._avoid_grace_s = avoid_grace_s
        self._named: tuple[TextRequest | None, list[int]] = (None, [])

    def create_replica_wrapper(self, replica_info: RunningReplicaInfo) -> RunningReplica:
        """A replica whose tokens come on direct streams."""
        return DirectReplica(replica_info)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of candidates; Serve takes the first that has room."""
        if pending_request is None:
            return [candidate_replicas]
        # Without this flag Serve retries in a busy loop while every replica is full.
        pending_request.routing_context.should_backoff = True
        candidates = self._without_avoided(candidate_replicas, pending_request)
        request = _text_request(pending_request)
        preferred = self._cached_replica(candidates, request) if request is not None else None
        if preferred is None:
            return [_two_of(candidates), candidates]
        return [[preferred], _two_of(candidates), candidates]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        """Remember where a prompt went."""
        request = _text_request(pending_request)
        if request is not None:
            self._affinity.record(self._names(request), replica_id.unique_id)

    def _names(self, request: TextRequest) -> list[int]:
        """Of its prompt; asked for when a replica is chosen, and soon again when it has agreed."""
        if self._named[0] is not request:
            self._named = (request, prefix_names(request.tenant, request.prompt_token_ids))
        return self._named[1]

    def _without_avoided(
        self, replicas: list[RunningReplica], pending_request: PendingRequest
    ) -> list[RunningReplica]:
        avoided = _avoided_replicas(pending_request)
        if not avoided:
            return replicas
        kept = [r for r in replicas if r.replica_id.unique_id not in avoided]
        if kept or time.time() - pending_request.created_at < self._avoid_grace_s:
            return kept
        return replicas

    def _cached_replica(
        self, replicas: list[RunningReplica], request: TextRequest
    ) -> RunningReplica | None:
        by_id = {replica.replica_id.unique_id: replica for replica in replicas}
        holders = self._affinity.lookup(self._names(request), self._held(by_id))
        if not holders:
            return None
        queues = {name: self._queue_len(replica) for name, replica in by_id.items()}
        cached = min(holders, key=queues.__getitem__)
        if queues[cached] > min(queues.values()) + self._max_queue_excess:
            return None
        return by_id[cached]

    def _held(self, replicas: Mapping[str, RunningReplica]) -> dict[str, HeldPrefixes | None]:
        """Reports of these replicas; one that has not changed is not read again."""
        known, self._reports = self._reports, {}
        for name, replica in replicas.items():
            told = replica.routing_stats
            before = known.get(name)
            if before is None or before[0] != told:
                before = (told, read_report(told))
            self._reports[name] = before
        return {name: held for name, (_, held) in self._reports.items()}

    def _queue_len(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _text_request(pending_request: PendingRequest) -> TextRequest | None:
    if pending_request.args and isinstance(pending_request.args[0], TextRequest):
        return pending_request.args[0]
    return None


def _avoided_replicas(pending_request: PendingRequest) -> tuple[str, ...]:
    if pending_request.args and isinstance(pending_request.args[0], TextRequest | Ping):
        return pending_request.args[0].avoid_replicas
    return ()


def _two_of(replicas: list[RunningReplica]) -> list[RunningReplica]:
    # Load balancing needs no cryptographic randomness.
    return random.sample(replicas, k=min(2, len(replicas)))
