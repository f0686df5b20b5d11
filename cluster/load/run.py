"""One load test: a schedule through surfaces, pools watched, a report."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cluster.errors import RequestError
from cluster.load.generator import LoadGenerator
from cluster.load.pool_sizes import PoolSizes
from cluster.load.summary import Slo, summarise, timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.load.outcome import Outcome
    from cluster.load.surfaces import Surface
    from cluster.load.workload import LoadRequest

_WATCH_EVERY_S = 1.0
_TELL_EVERY_S = 0.5
_NUM_INTERVALS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTest:
    """What is run.

    Attributes:
        schedule: at least one request, in the order of their times.
        surfaces: requests take them in turn.
        slo: of good requests.
        timeout_s: of one request.
        max_in_flight: see ``LoadGenerator``.
        metrics_url: of the cluster whose pools are watched, or None.
    """

    schedule: Sequence[LoadRequest]
    surfaces: Sequence[Surface]
    slo: Slo
    timeout_s: float
    max_in_flight: int
    metrics_url: str | None = None

    async def run(
        self, on_progress: Callable[[Progress], None], stop: asyncio.Event | None = None
    ) -> tuple[dict[str, Any], list[Outcome]]:
        """Send everything and wait for the last end.

        Args:
            on_progress: told now and then where the run is.
            stop: when it is set, nothing more is sent and what is in flight is broken off. Such
                requests are in no figure of the report but in ``stopped``.

        Returns:
            The report, fit for JSON, and what became of each request that was due.

        Raises:
            RequestError: stopped before any request had ended.
        """
        stop = stop or asyncio.Event()
        generator = LoadGenerator(
            self.surfaces, timeout_s=self.timeout_s, max_in_flight=self.max_in_flight
        )
        watching = [asyncio.create_task(self._tell(generator, on_progress))]
        pools = PoolSizes(self.metrics_url or "", generator.seconds)
        if self.metrics_url:
            watching.append(asyncio.create_task(pools.watch(_WATCH_EVERY_S)))
        sending = asyncio.create_task(generator.run(self.schedule))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((sending, stopping), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            tasks = (*watching, sending, stopping)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for surface in self.surfaces:
                await surface.close()
        return self._report(generator, pools), generator.outcomes

    async def _tell(
        self, generator: LoadGenerator, on_progress: Callable[[Progress], None]
    ) -> None:
        while True:
            endings = Counter(each.ending for each in generator.outcomes)
            on_progress(
                Progress(
                    num_due=len(generator.outcomes),
                    num_in_flight=generator.num_in_flight,
                    num_complete=endings["complete"],
                    num_failed=endings["failed"] + endings["rejected"],
                )
            )
            await asyncio.sleep(_TELL_EVERY_S)

    def _report(self, generator: LoadGenerator, pools: PoolSizes) -> dict[str, Any]:
        outcomes = [each for each in generator.outcomes if each.ending != "unfinished"]
        if not outcomes:
            raise RequestError("stopped before any request had ended: there is nothing to report")
        seconds = max(outcome.ended_s for outcome in outcomes)
        step_s = max(1.0, round(self.schedule[-1].at_s / _NUM_INTERVALS))
        names = [surface.name for surface in self.surfaces]
        return {
            "slo": asdict(self.slo),
            "stopped": self._stopped(generator, len(outcomes)),
            "all": asdict(summarise(outcomes, self.slo, seconds)),
            "surfaces": {
                name: asdict(summarise(own, self.slo, seconds))
                for name in names
                if (own := [each for each in outcomes if each.surface == name])
            },
            "timeline": timeline(outcomes, self.slo, step_s),
            "replicas": pools.samples,
        }

    def _stopped(self, generator: LoadGenerator, num_ended: int) -> dict[str, Any] | None:
        if num_ended == len(self.schedule):
            return None
        num_due = len(generator.outcomes)
        return {
            "at_s": generator.seconds(),
            "num_broken_off": num_due - num_ended,
            "num_never_due": len(self.schedule) - num_due,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run is: requests that were due, and what became of them so far."""

    num_due: int
    num_in_flight: int
    num_complete: int
    num_failed: int
