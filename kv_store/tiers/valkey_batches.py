"""Batches for a server or a cluster: divided among the servers, pipelined, under one deadline."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kv_store.errors import TierUnavailableError
from kv_store.tiers.breaker import CircuitBreaker
from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.valkey_pipeline import Redirect
from kv_store.tiers.valkey_topology import make_topology

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store.keys import PageKey
    from kv_store.tiers.valkey_exchange import Exchange
    from kv_store.tiers.valkey_server import ValkeyServer
    from kv_store.tiers.valkey_topology import ValkeyAddress

T = TypeVar("T")
U = TypeVar("U")

_MAX_REDIRECTS = 3
# Fewer items are sooner there over one connection: to wake up a second thread takes longer.
_MIN_SHARE = 8
# A shard that hangs must leave time to hand over what the others gave.
_SHARD_SHARE = 0.9


def page_name(key: PageKey) -> bytes:
    """The server's name of a page; ``kv:{<namespace>:*`` is an ACL pattern for one namespace."""
    return b"kv:{%b:%b}" % (key.namespace_id.hex().encode(), key.page_hash.hex().encode())


def default_breaker() -> CircuitBreaker:
    """For whoever has no configuration."""
    return CircuitBreaker(max_failures=3, open_s=1.0, max_open_s=30.0)


class _Route(NamedTuple):
    """Where a part of a batch goes."""

    server: ValkeyServer
    is_asking: bool = False


class ValkeyBatches:
    """Connects on first use. Lives on one event loop.

    Of a cluster, what a shard has that does not answer is a miss, and costs no time once its
    breaker is open.
    """

    def __init__(
        self,
        address: ValkeyAddress,
        *,
        connect_timeout_s: float,
        operation_timeout_s: float,
        max_connections: int,
        make_breaker: Callable[[], CircuitBreaker] = default_breaker,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            address: where the server or servers are.
            connect_timeout_s: limit of one connection attempt.
            operation_timeout_s: limit of one batch, its wait for a connection included.
            max_connections: to each server; more batches queue.
            make_breaker: called for each server of a cluster.

        Raises:
            ValueError: not an address of these kinds.
        """
        self._operation_timeout_s = operation_timeout_s
        self._topology = make_topology(
            address,
            connect_timeout_s=connect_timeout_s,
            operation_timeout_s=operation_timeout_s,
            num_connections=max_connections,
            buffers=BufferPool(),
            make_breaker=make_breaker,
        )
        self._is_closed = False

    def close(self) -> None:
        """Close the connections; batches under way fail. Idempotent."""
        self._is_closed = True
        self._topology.close()

    async def run(
        self,
        operation: Callable[[Exchange, Sequence[T]], Sequence[U | Redirect]],
        items: Sequence[T],
        names: Sequence[bytes],
        *,
        miss: U,
        is_shared: bool = True,
    ) -> list[U]:
        """An operation on many items, on the servers that have them.

        Args:
            operation: on the items of one server.
            items: what to operate on.
            names: their keys.
            miss: the result of an item whose server failed while another did not.
            is_shared: whether one server's items are divided among its connections.

        Raises:
            TierUnavailableError: no server answered.
        """
        if self._is_closed:
            raise TierUnavailableError("the connections are closed")
        if not items:
            return []
        deadline = time.monotonic() + self._operation_timeout_s * _SHARD_SHARE
        await self._topology.ready()
        results = [miss] * len(items)
        waiting: dict[_Route, Sequence[int]] = {
            _Route(server): indices for server, indices in self._topology.divide(names).items()
        }
        failures: list[TierUnavailableError] = []
        has_answer = False
        for _ in range(1 + _MAX_REDIRECTS):
            shares = [
                (route, share)
                for route, indices in waiting.items()
                for share in _divided(indices, route.server.num_connections if is_shared else 1)
            ]
            outcomes = await asyncio.gather(
                *(
                    _ask(route, operation, [items[index] for index in share], deadline)
                    for route, share in shares
                ),
                return_exceptions=True,
            )
            redirected: dict[_Route, list[int]] = defaultdict(list)
            for (route, share), outcome in zip(shares, outcomes, strict=True):
                if isinstance(outcome, TierUnavailableError):
                    failures.append(outcome)
                    continue
                if isinstance(outcome, BaseException):
                    raise outcome
                for index, result in zip(share, outcome, strict=True):
                    if isinstance(result, Redirect):
                        target = self._topology.follow(result, route.server)
                        redirected[_Route(target, result.is_ask)].append(index)
                    else:
                        results[index] = result
                        has_answer = True
            if not redirected:
                break
            waiting = dict(redirected)
        if failures:
            self._topology.refresh_soon()
            if not has_answer:
                raise failures[0]
        return results


async def _ask(
    route: _Route,
    operation: Callable[[Exchange, Sequence[T]], Sequence[U | Redirect]],
    items: Sequence[T],
    deadline: float,
) -> Sequence[U | Redirect]:
    return await route.server.run(
        lambda exchange: operation(exchange, items), deadline, is_asking=route.is_asking
    )


def _divided(indices: Sequence[int], num_shares: int) -> list[Sequence[int]]:
    size = max(_MIN_SHARE, -(-len(indices) // num_shares))
    return [indices[start : start + size] for start in range(0, len(indices), size)]
