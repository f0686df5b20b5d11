"""``make loadtest``: the default model at this machine's capacity, over HTTP and gRPC.

A closed loop finds the capacity; then the generator of ``paceline bench serve`` offers shares of
it, open loop. The last part sends one schedule with it and with aiperf in turn and compares what
both saw.
Prints tables, writes ``build/reports/loadtest.json`` and ``loadtest.png``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import default_cache_dir
from cluster.load.arrivals import Segment, arrival_times
from cluster.load.run import LoadTest
from cluster.load.summary import Slo
from cluster.load.surfaces import surfaces
from cluster.load.workload import builtin_questions, of_questions
from cluster.local_cluster import STOP_TIMEOUT_S
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from tests.bench.loadtest.aiperf import AiPerf, as_aiperf_counts
from tests.bench.loadtest.bars import hold_bars
from tests.bench.loadtest.capacity import Capacity, find_capacity
from tests.bench.loadtest.report import draw, show
from tests.bench.loadtest.wire import Wire, wire
from tests.integration.cluster.cluster_process import ClusterProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.load.outcome import Outcome
    from cluster.load.surfaces import Surface
    from cluster.load.workload import LoadRequest
    from cluster.state import ClusterState

_REPORT = Path("build/reports/loadtest.json")
_TIMEOUT_S = 120.0
_MAX_IN_FLIGHT = 1024
_START_S = 600.0
_SLO = Slo(ttft_s=2.0, tpot_s=0.25)
_CONFIG = """
server: {{http_port: 0, grpc_port: 0}}
kv:
  tiers:
    - {{kind: embedded_valkey}}
    - {{kind: ssd, root: {root}, budget_bytes: 1073741824}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is asked.

    Attributes:
        shares: of the capacity, that are offered one after the other.
        seconds: of each.
        warm_s: of the closed loop, uncounted.
        num_checks: pairs of runs with ``check_share`` of the capacity.
        max_tokens: of every answer.
        num_clients: of the closed loop.
        slo: of good requests.
    """

    shares: tuple[float, ...]
    seconds: float
    warm_s: float
    num_checks: int
    check_share: float = 0.5
    max_tokens: int = 64
    num_clients: int = 24
    slo: Slo = _SLO


FULL = Plan(shares=(0.25, 0.5, 0.8, 1.0, 1.3), seconds=60, warm_s=15, num_checks=4)
QUICK = Plan(shares=(0.5, 1.3), seconds=20, warm_s=10, num_checks=1)


def main() -> int:
    """Measure and report.

    Returns:
        1 if a bar does not hold.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="three minutes, for a look")
    plan = QUICK if parser.parse_args().quick else FULL
    _REPORT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="paceline-load-") as name:
        report = _measure(plan, Path(name))
    report["bars"] = hold_bars(report["steps"], report["checks"], report["absent"])
    _REPORT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, _REPORT.with_suffix(".png"))
    show(report)
    return 1 if any(bar["holds"] is False for bar in report["bars"].values()) else 0


def _measure(plan: Plan, folder: Path) -> dict[str, Any]:
    model_folder = prepare_builtin(default_cache_dir(), _say)
    peer: AiPerf | None = None
    absent = ""
    try:
        peer = AiPerf(_REPORT.parent.absolute() / "aiperf", model_folder)
    except subprocess.CalledProcessError as error:
        absent = f"pip could not install it and ended with {error.returncode}"
    with _cluster(folder) as state:
        load = _Load(state, plan)
        _say("looking for the capacity")
        capacity = asyncio.run(load.capacity())
        steps = []
        for share in plan.shares:
            rate = share * capacity.requests_per_s
            _say(f"offering {share:g} of it")
            steps.append({"share": share, "rate": rate, "report": asyncio.run(load.step(rate))})
        checks = []
        if peer is not None:
            schedule = load.schedule(plan.check_share * capacity.requests_per_s, ignore_eos=True)
            asyncio.run(load.alone(schedule, load.url))  # every prompt has now been seen once
            with wire(load.url) as between:
                for number in range(plan.num_checks):
                    _say(f"comparing with aiperf, {number + 1} of {plan.num_checks}")
                    checks.append(_check(load, peer, schedule, between, ours_first=number % 2 == 0))
    return {
        "capacity": asdict(capacity),
        "plan": asdict(plan),
        "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "steps": steps,
        "checks": checks,
        "absent": absent,
    }


class _Load:
    """What is sent to one cluster."""

    def __init__(self, state: ClusterState, plan: Plan) -> None:
        self._state = state
        self._plan = plan
        self.model, self.url = state.model, state.http_url

    def schedule(self, rate: float, *, ignore_eos: bool = False) -> list[LoadRequest]:
        """Poisson arrivals of the package's questions."""
        segment = Segment(rate, rate, self._plan.seconds)
        times = arrival_times([segment], burstiness=1.0, seed=1)
        asked = of_questions(times, builtin_questions(), self._plan.max_tokens)
        return [replace(request, ignore_eos=ignore_eos) for request in asked]

    async def capacity(self) -> Capacity:
        """Over HTTP."""
        [surface] = self._surfaces(self.url, "http")
        try:
            return await find_capacity(
                surface,
                list(of_questions(range(1000), builtin_questions(), self._plan.max_tokens)),
                num_clients=self._plan.num_clients,
                warm_s=self._plan.warm_s,
                seconds=self._plan.seconds,
            )
        finally:
            await surface.close()

    async def step(self, rate: float) -> dict[str, Any]:
        """Both surfaces; the report of ``paceline bench serve``."""
        report, _ = await self._test(self.schedule(rate), self.url, "http", "grpc")
        return report

    async def alone(self, schedule: list[LoadRequest], url: str) -> list[Outcome]:
        """HTTP only."""
        _, outcomes = await self._test(schedule, url, "http")
        return outcomes

    async def _test(
        self, schedule: list[LoadRequest], url: str, *names: str
    ) -> tuple[dict[str, Any], list[Outcome]]:
        test = LoadTest(
            schedule=schedule,
            surfaces=self._surfaces(url, *names),
            slo=self._plan.slo,
            timeout_s=_TIMEOUT_S,
            max_in_flight=_MAX_IN_FLIGHT,
        )
        return await test.run(lambda _: None)

    def _surfaces(self, url: str, *names: str) -> list[Surface]:
        return surfaces(
            names,
            http_url=url,
            grpc_address=self._state.grpc_address,
            model=self.model,
            api_key=None,
            temperature=0.0,
        )


def _check(
    load: _Load, peer: AiPerf, schedule: list[LoadRequest], between: Wire, *, ours_first: bool
) -> dict[str, dict[str, float]]:
    """Both tools; which one goes first changes, so that a machine that drifts favours neither.

    Returns:
        By tool what it saw, and by ``wire of TOOL`` what passed between it and the server.
    """
    url = between.url
    tools: dict[str, Callable[[], dict[str, float]]] = {
        "paceline": lambda: as_aiperf_counts(asyncio.run(load.alone(schedule, url))),
        "aiperf": lambda: peer.run(url, load.model, schedule),
    }
    check: dict[str, dict[str, float]] = {}
    for name in tools if ours_first else reversed(tools):
        seen, passed = between.timed(len(schedule), tools[name])
        check |= {name: seen, f"wire of {name}": passed}
    return check


@contextmanager
def _cluster(folder: Path) -> Iterator[ClusterState]:
    """``paceline serve`` with the default settings, save ports and where pages lie."""
    _say("starting a cluster")
    config = folder / "config.yaml"
    config.write_text(_CONFIG.format(root=folder / "pages"), encoding="utf-8")
    command = ["-m", "cluster", "serve", "--prepare", "--config", str(config)]
    process = ClusterProcess(command, folder / "state")
    try:
        yield process.wait_for("serving until Ctrl-C", _START_S)
        process.signal(signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S + 10)
    finally:
        process.kill()


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
