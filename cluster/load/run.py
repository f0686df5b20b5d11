"""One load test: a schedule through surfaces, pools watched, a report."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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
        self, on_progress: Callable[[Progress], None]
    ) -> tuple[dict[str, Any], list[Outcome]]:
        """Send everything and wait for the last end.

        Returns:
            The report, fit for JSON, and what became of each request.
        """
        generator = LoadGenerator(
            self.surfaces, timeout_s=self.timeout_s, max_in_flight=self.max_in_flight
        )
        watching = [asyncio.create_task(self._tell(generator, on_progress))]
        pools = PoolSizes(self.metrics_url or "", generator.seconds)
        if self.metrics_url:
            watching.append(asyncio.create_task(pools.watch(_WATCH_EVERY_S)))
        try:
            await generator.run(self.schedule)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            for surface in self.surfaces:
                await surface.close()
        return self._report(generator.outcomes, pools), generator.outcomes

    async def _tell(
        self, generator: LoadGenerator, on_progress: Callable[[Progress], None]
    ) -> None:
        while True:
            endings = Counter(each.ending for each in generator.outcomes if each.ended_s)
            on_progress(
                Progress(
                    num_due=len(generator.outcomes),
                    num_in_flight=generator.num_in_flight,
                    num_complete=endings["complete"],
                    num_failed=endings["failed"] + endings["rejected"],
                )
            )
            await asyncio.sleep(_TELL_EVERY_S)

    def _report(self, outcomes: list[Outcome], pools: PoolSizes) -> dict[str, Any]:
        seconds = max(outcome.ended_s for outcome in outcomes)
        step_s = max(1.0, round(self.schedule[-1].at_s / _NUM_INTERVALS))
        names = [surface.name for surface in self.surfaces]
        return {
            "slo": asdict(self.slo),
            "all": asdict(summarise(outcomes, self.slo, seconds)),
            "surfaces": {
                name: asdict(summarise(own, self.slo, seconds))
                for name in names
                if (own := [each for each in outcomes if each.surface == name])
            },
            "timeline": timeline(outcomes, self.slo, step_s),
            "replicas": pools.samples,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run is: requests that were due, and what became of them so far."""

    num_due: int
    num_in_flight: int
    num_complete: int
    num_failed: int
