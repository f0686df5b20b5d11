"""Sends a schedule of requests, each at its time, and keeps what became of them."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

from cluster.load.outcome import Outcome
from cluster.load.surfaces import BrokenError, RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from cluster.load.surfaces import Surface
    from cluster.load.workload import LoadRequest


class LoadGenerator:
    """Open-loop: a request never waits for another one's answer.

    Args:
        surfaces: requests take them in turn; with the same schedule, each then carries its share
            of the same arrivals.
        timeout_s: of one request, after which it has failed.
        max_in_flight: bounds this side's memory; a request due beyond it fails at once, unsent.
    """

    def __init__(
        self, surfaces: Sequence[Surface], *, timeout_s: float, max_in_flight: int
    ) -> None:
        self._surfaces = surfaces
        self._timeout_s = timeout_s
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self._started = 0.0
        self.outcomes: list[Outcome] = []
        """Of all requests that were due so far; those in flight have not ended."""

    @property
    def num_in_flight(self) -> int:
        """Requests sent and not ended."""
        return self._in_flight

    def seconds(self) -> float:
        """Seconds since the start of the run."""
        return time.perf_counter() - self._started

    async def run(
        self, schedule: Iterable[LoadRequest], on_sent: Callable[[], None] = lambda: None
    ) -> None:
        """Send all, and wait until each has ended; ``outcomes`` has them.

        Cancelling it breaks off what is in flight; those outcomes stay unfinished.

        Args:
            schedule: in the order of their times.
            on_sent: called behind every one.
        """
        self._started = time.perf_counter()
        async with asyncio.TaskGroup() as asking:
            for index, request in enumerate(schedule):
                surface = self._surfaces[index % len(self._surfaces)]
                if (wait_s := request.at_s - self.seconds()) > 0:
                    await asyncio.sleep(wait_s)
                outcome = Outcome(index=index, surface=surface.name, due_s=request.at_s)
                self.outcomes.append(outcome)
                if self._in_flight >= self._max_in_flight:
                    outcome.sent_s = outcome.ended_s = self.seconds()
                    outcome.ending = "failed"
                    outcome.error = f"not sent: {self._max_in_flight} are in flight"
                else:
                    self._in_flight += 1
                    asking.create_task(self._ask(surface, request, outcome))
                on_sent()

    async def _ask(self, surface: Surface, request: LoadRequest, outcome: Outcome) -> None:
        outcome.sent_s = self.seconds()
        counts = None
        try:
            answer = aclosing(surface.ask(request, self._timeout_s))
            async with asyncio.timeout(self._timeout_s), answer as pieces:
                async for piece in pieces:
                    if piece.has_text:
                        outcome.event_s.append(self.seconds())
                    counts = piece.counts or counts
        except RefusedError as error:
            outcome.ending, outcome.error = "rejected", str(error)
        except BrokenError as error:
            outcome.ending, outcome.error = "failed", str(error)
        except TimeoutError:
            outcome.ending = "failed"
            outcome.error = f"no end within {self._timeout_s:g} s"
        finally:
            outcome.ended_s = self.seconds()
            self._in_flight -= 1
        if outcome.error is not None:
            return
        if counts is None:
            outcome.ending = "failed"
            outcome.error = "the stream ended without usage"
            return
        outcome.event_s = outcome.event_s or [outcome.ended_s]  # an answer of no text
        outcome.ending = "complete"
        outcome.num_prompt_tokens = counts.num_prompt_tokens
        outcome.num_output_tokens = counts.num_output_tokens
        outcome.num_cached_tokens = counts.num_cached_tokens
