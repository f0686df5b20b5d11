"""Whose questions a full batch answers: those of tenants that were drafted for least of late."""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.engine.speculation.types import DraftQuery

K = TypeVar("K")

_KEPT_PER_BATCH = 0.98
"""So a tenant that was away has credit for some fifty batches, not for all it ever missed."""
_FORGOTTEN = 1.0


class Waiting(NamedTuple):
    """A question that waits, and whose it is."""

    tenant: str
    query: DraftQuery


class FairBatches(Generic[K]):
    """A counter per tenant, of draft tokens made for it; they fade.

    Source: virtual token counters (Sheng et al., OSDI 2024), with fading in place of lifting, since
    every session's question comes and goes once a round. Belongs to one thread.

    Args:
        max_sessions: questions of one batch.
    """

    def __init__(self, max_sessions: int) -> None:
        self._max_sessions = max_sessions
        self._charged: dict[str, float] = {}

    def choose(self, waiting: Mapping[K, Waiting]) -> dict[K, int]:
        """Choose the questions of the next batch, and charge their tenants.

        While more wait than fit, the tenant that was charged least goes next with its oldest
        question; so a tenant with few sessions never waits for one with many. Guesses are shed
        before sessions are, but not those of a tenant that waits with no more than its share.

        Args:
            waiting: oldest first.

        Returns:
            The fan-out granted to each that was chosen.
        """
        queues: dict[str, deque[tuple[K, int]]] = {}
        for key, item in waiting.items():
            queues.setdefault(item.tenant, deque()).append((key, item.query.fanout))
        if len(waiting) > self._max_sessions:
            share = max(1, self._max_sessions // len(queues))
            for tenant, queue in queues.items():
                queues[tenant] = deque(
                    (key, granted_fanout(fanout, len(queue), share)) for key, fanout in queue
                )
        self._charged = {
            tenant: _KEPT_PER_BATCH * charged
            for tenant, charged in self._charged.items()
            if charged >= _FORGOTTEN
        }
        chosen: dict[K, int] = {}
        # Among equals the one with the oldest question.
        turns = [
            (self._charged.get(tenant, 0.0), place, tenant) for place, tenant in enumerate(queues)
        ]
        heapq.heapify(turns)
        while turns and len(chosen) < self._max_sessions:
            charged, place, tenant = turns[0]
            key, fanout = queues[tenant].popleft()
            chosen[key] = fanout
            self._charged[tenant] = charged + _cost(waiting[key].query, fanout)
            if queues[tenant]:
                heapq.heapreplace(turns, (self._charged[tenant], place, tenant))
            else:
                heapq.heappop(turns)
        return chosen


def granted_fanout(fanout: int, num_waiting: int, share: int) -> int:
    """Fan-out that a full batch grants a tenant's questions.

    Args:
        fanout: what the target asked.
        num_waiting: questions of this tenant.
        share: questions per tenant that fit into a batch.
    """
    return fanout if num_waiting <= share else max(1, fanout * share // num_waiting)


def _cost(query: DraftQuery, fanout: int) -> int:
    """Draft tokens, guessed bonus tokens included."""
    return fanout * (len(query.in_flight) + 1) * (query.num_draft_tokens + 1)
