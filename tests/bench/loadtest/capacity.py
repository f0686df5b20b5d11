"""How much a cluster does at most: a few clients that ask again as soon as they are answered."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cluster.load.surfaces import Surface
    from cluster.load.workload import LoadRequest

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """What came of it, within the time that was looked at.

    Attributes:
        requests_per_s: whole answers.
        output_tokens_per_s: of these answers.
        num_clients: that were never without a request.
    """

    requests_per_s: float
    output_tokens_per_s: float
    num_clients: int


async def find_capacity(
    surface: Surface,
    requests: Sequence[LoadRequest],
    *,
    num_clients: int,
    warm_s: float,
    seconds: float,
) -> Capacity:
    """Ask over and over again; their times do not matter.

    Args:
        surface: to ask through.
        requests: that are asked in turn, again and again.
        num_clients: more than the engine computes at once.
        warm_s: until the pool is full, and answers end at different times.
        seconds: that are counted, behind it.

    Raises:
        RefusedError: too many clients.
        BrokenError: the cluster fails.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time() + warm_s
    end = begin + seconds
    ended: list[int] = []

    async def client(source: Iterator[LoadRequest]) -> None:
        while loop.time() < end:
            num_tokens = 0
            async for piece in surface.ask(next(source), _TIMEOUT_S):
                if piece.counts is not None:
                    num_tokens = piece.counts.num_output_tokens
            if begin <= loop.time() < end:
                ended.append(num_tokens)

    source = cycle(requests)
    async with asyncio.TaskGroup() as clients:
        for _ in range(num_clients):
            clients.create_task(client(source))
    return Capacity(len(ended) / seconds, sum(ended) / seconds, num_clients)
