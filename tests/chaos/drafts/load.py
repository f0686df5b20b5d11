"""A steady load of requests whose texts are known, and what happens to it from moment to moment."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.draft_sessions import DraftSessions
    from deployments.engine.base import Engine
    from deployments.engine.speculation.split_speculator import SplitSpeculator
    from deployments.engine.types import GenerationRequest

SAMPLE_S = 0.1


class Sample(NamedTuple):
    """What had happened by then.

    Attributes:
        at: seconds, monotonic.
        num_tokens: that clients got.
        num_table_tokens: accepted ones from the pool's tables.
    """

    at: float
    num_tokens: int
    num_table_tokens: int


@dataclass(slots=True)
class Answer:
    """What became of one request; ``error`` is empty where it ended as it should."""

    request: GenerationRequest
    token_ids: list[int]
    error: str = ""


class Load:
    """As many requests at a time as told, each followed by the next one.

    Args:
        requests: asked in turn, again and again.
        num_clients: requests at a time.
    """

    def __init__(
        self,
        engine: Engine,
        speculator: SplitSpeculator,
        requests: Sequence[GenerationRequest],
        num_clients: int,
    ) -> None:
        self.answers: list[Answer] = []
        self.samples: list[Sample] = []
        self._engine = engine
        self._speculator = speculator
        self._requests = requests
        self._num_clients = num_clients
        self._num_asked = 0
        self._num_tokens = 0
        self._is_over = False
        self._tasks: list[asyncio.Task[None]] = []

    async def once(self) -> list[Answer]:
        """Every request once, without drafts: the texts that are expected."""
        gate = asyncio.Semaphore(self._num_clients)

        async def ask(request: GenerationRequest) -> Answer:
            async with gate:
                return await self._ask(replace(request, speculation=False))

        return await asyncio.gather(*map(ask, self._requests))

    def start(self, sessions: DraftSessions | None) -> None:
        """Begin; without ``sessions`` nothing is drafted."""
        self._is_over = False
        clients = (self._client(sessions) for _ in range(self._num_clients))
        self._tasks = [asyncio.create_task(each) for each in (*clients, self._watch())]

    async def stop(self) -> None:
        """Let what runs come to its end."""
        self._is_over = True
        await asyncio.gather(*self._tasks)

    async def _client(self, sessions: DraftSessions | None) -> None:
        while not self._is_over:
            request = self._requests[self._num_asked % len(self._requests)]
            self._num_asked += 1
            # The same text under a name of its own.
            asked = replace(request, request_id=f"{request.request_id}/{self._num_asked}")
            with ExitStack() as stack:
                if sessions is None:
                    asked = replace(asked, speculation=False)
                else:
                    stack.enter_context(sessions.session(asked.request_id))
                answer = await self._ask(asked)
            self.answers.append(Answer(request, answer.token_ids, answer.error))

    async def _ask(self, request: GenerationRequest) -> Answer:
        answer = Answer(request, [])
        ends = []
        try:
            async for delta in self._engine.generate(request):
                answer.token_ids += delta.token_ids
                self._num_tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    ends.append(delta.finish_reason.value)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is counted and told
            ends.append(repr(error))
        if ends not in (["length"], ["stop"]):
            answer.error = f"{request.request_id} ended in {ends}"
        return answer

    async def _watch(self) -> None:
        while not self._is_over:
            stats = self._speculator.stats()
            self.samples.append(
                Sample(time.monotonic(), self._num_tokens, stats.num_pool_accepted_tokens)
            )
            await asyncio.sleep(SAMPLE_S)
