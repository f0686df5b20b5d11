"""Clients of an engine: they read, lose patience, and write down how every request ended."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from deployments.engine.errors import DeadlineExceededError, EngineOverloadedError

if TYPE_CHECKING:
    from deployments.engine.base import Engine
    from deployments.engine.types import GenerationRequest
    from tests.soak.engine.workload import Call, Workload

_SERVED = ("stop", "length", "abort", "client left")


@dataclass(slots=True)
class Latencies:
    """Seconds, of a bounded number of requests: beyond, each new one replaces a random old one."""

    first_token: list[float] = field(default_factory=list)
    per_token: list[float] = field(default_factory=list)
    num_seen: int = 0

    def add(self, first_token_s: float, per_token_s: float | None) -> None:
        self.num_seen += 1
        for kept, value in ((self.first_token, first_token_s), (self.per_token, per_token_s)):
            if value is None:
                continue
            if len(kept) < 2000:
                kept.append(value)
            elif (place := random.randrange(self.num_seen)) < 2000:  # noqa: S311
                kept[place] = value


class Clients:
    """Sends calls to an engine and counts what becomes of them."""

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self._engine = engine
        self._workload = workload
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_sent = 0
        self.num_tokens = 0
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.latencies = Latencies()

    @property
    def num_served(self) -> int:
        """Requests that got what they wanted, or as much of it as they wanted."""
        return sum(self.outcomes[outcome] for outcome in _SERVED)

    @property
    def num_open(self) -> int:
        """Requests whose end is not known yet."""
        return len(self._tasks)

    async def send_at(self, requests_per_s: float, duration_s: float) -> None:
        """Poisson arrivals; nobody waits for anybody."""
        rng = random.Random(round(1000 * requests_per_s))  # noqa: S311
        now = time.monotonic()
        end = now + duration_s
        while True:
            call = self._workload.next(time.time())
            now += rng.expovariate(requests_per_s) * len(call.requests)
            if now >= end:
                await asyncio.sleep(max(0.0, end - time.monotonic()))
                return
            await asyncio.sleep(max(0.0, now - time.monotonic()))
            self._send(call)

    async def keep_busy(self, num_open: int, duration_s: float, min_served: int) -> float:
        """As many requests as it takes to have so many open, until enough of them were served.

        Returns:
            Requests served per second.
        """
        started = time.monotonic()
        before = self.num_served
        while True:
            while self.num_open < num_open:
                self._send(self._workload.next(time.time()))
            await asyncio.wait(self._tasks, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
            num_served = self.num_served - before
            elapsed_s = time.monotonic() - started
            if elapsed_s >= duration_s and num_served >= min_served:
                return num_served / elapsed_s

    async def wait(self, timeout_s: float) -> None:
        """Until every request has ended; those that have not are wrong."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        self.wrong += [f"{task.get_name()} never ended" for task in self._tasks]
        await self.leave()

    async def leave(self) -> None:
        """Stop to read, all at once."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _send(self, call: Call) -> None:
        for request in call.requests:
            self.num_sent += 1
            task = asyncio.create_task(self._read(request, call), name=request.request_id)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _read(self, request: GenerationRequest, call: Call) -> None:
        started = first = last = time.monotonic()
        num_tokens = 0
        ends: list[str] = []
        stream = self._engine.generate(request)
        try:
            async for delta in stream:
                last = time.monotonic()
                if ends:
                    self.wrong.append(f"{request.request_id}: more after {ends}")
                first = first if num_tokens else last
                num_tokens += len(delta.token_ids)
                self.num_tokens += len(delta.token_ids)
                if delta.finish_reason is not None:
                    ends.append(delta.finish_reason.value)
                elif call.leaves_after_tokens is not None and num_tokens > call.leaves_after_tokens:
                    if call.leaves_by == "close":
                        await stream.aclose()
                        ends.append("client left")
                        break
                    self._engine.abort(request.request_id)
        except (EngineOverloadedError, DeadlineExceededError) as error:
            ends.append(type(error).__name__)
        except asyncio.CancelledError:
            ends.append("client left")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is written down
            ends.append(repr(error))
            self.wrong.append(f"{request.request_id}: {error!r}")
        if len(ends) != 1:
            self.wrong.append(f"{request.request_id}: ended in {ends}")
        self.outcomes[ends[0] if ends else "nothing"] += 1
        if num_tokens:
            each_s = (last - first) / (num_tokens - 1) if num_tokens > 1 else None
            self.latencies.add(first - started, each_s)
