"""Runs the load on one cluster; a process of its own, because Ray reads its environment once."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError, RequestError
from cluster.load.run import LoadTest
from cluster.load.summary import Slo
from cluster.load.surfaces import surfaces
from cluster.local_cluster import LocalCluster
from cluster.metrics_reader import MetricsSnapshot
from cluster.serve_app import paceline_app
from tests.bench.autoscale.plan import TTFT_SLO_S

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.load.outcome import Outcome
    from cluster.load.workload import LoadRequest
    from cluster.state import ClusterState
    from tests.bench.autoscale.plan import Plan

logger = logging.getLogger(__name__)

_SAMPLE_S = 1.0
_TIMEOUT_S = 120.0
_MAX_IN_FLIGHT = 2048
_REST_S = 240.0
_TOLD = "autoscaling: "


def run_cluster(plan: Plan, *, is_static: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Start a cluster, put the load on it, stop it.

    Returns:
        The load's report, with ``replicas`` of every pool over time, what was decided why, and
        whether a rolling update ran to its end.
    """
    cluster = LocalCluster(plan.config(is_static=is_static), paceline_app(), on_progress=say)
    with cluster:
        return asyncio.run(_run(plan, cluster, is_static=is_static, say=say))


def _load_test(schedule: list[LoadRequest], state: ClusterState) -> LoadTest:
    """The load; to be made on the event loop it runs on, where gRPC's channels stay."""
    return LoadTest(
        schedule=schedule,
        surfaces=surfaces(
            ("http", "grpc"),
            http_url=state.http_url,
            grpc_address=state.grpc_address,
            model=state.model,
            api_key=None,
            temperature=0.0,
        ),
        slo=Slo(ttft_s=TTFT_SLO_S),
        timeout_s=_TIMEOUT_S,
        max_in_flight=_MAX_IN_FLIGHT,
    )


async def _run(
    plan: Plan,
    cluster: LocalCluster,
    *,
    is_static: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    test = _load_test(plan.schedule(), cluster.state)
    watch = _Watch(cluster.state.metrics_url)
    watching = asyncio.create_task(watch.run())
    updating = None
    if not is_static:
        updating = asyncio.create_task(_update(plan, cluster))
    said = 0.0

    def tell(progress: Any) -> None:
        nonlocal said
        if time.monotonic() - said > 10:
            said = time.monotonic()
            latest = watch.samples[-1]["replicas"] if watch.samples else {}
            say(f"{progress} {latest}")

    report, outcomes = await test.run(tell)
    report["is_updated"] = await updating if updating is not None else None
    if not is_static:
        say("no more requests: drafts are to go, and to come back with the next ones")
        report["drafts_rest"], later = await _drafts_rest(plan, cluster.state)
        outcomes += later
    watching.cancel()
    for ended in await asyncio.gather(watching, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    report["replicas"] = watch.samples
    report["decisions"] = watch.decisions
    report["explained"] = {"log": _logged(cluster.state), "metric": watch.directions}
    report["lost"] = [
        {"due_s": each.due_s, "surface": each.surface, "error": each.error}
        for each in outcomes
        if each.ending == "failed"
    ]
    return report


async def _update(plan: Plan, cluster: LocalCluster) -> dict[str, float] | str:
    """Replace all replicas under load; when it began and ended, or why it failed."""
    started = time.monotonic()
    await asyncio.sleep(plan.update_at_s)
    try:
        await asyncio.to_thread(cluster.replace, plan.updated())
    except ClusterError as error:
        return str(error)
    return {"began_s": plan.update_at_s, "ended_s": time.monotonic() - started}


async def _drafts_rest(
    plan: Plan, state: ClusterState
) -> tuple[dict[str, float] | str, list[Outcome]]:
    """Wait until nobody drafts for nobody, then ask until somebody drafts again.

    Returns:
        How long either took, or which of them did not happen; and what became of the requests.
    """
    began = time.monotonic()
    while (await asyncio.to_thread(_replicas))[0].get("draft"):
        if time.monotonic() - began > _REST_S:
            return f"draft replicas are still there {_REST_S:.0f} s after the last request", []
        await asyncio.sleep(_SAMPLE_S)
    gone = time.monotonic()
    outcomes: list[Outcome] = []
    while not (await asyncio.to_thread(_replicas))[1].get("draft"):
        if time.monotonic() - gone > _REST_S:
            return f"no draft replica came back within {_REST_S:.0f} s", outcomes
        _, more = await _load_test(plan.trickle(), state).run(lambda _: None)
        outcomes += more
    back_s = time.monotonic() - gone
    return {"gone_after_s": gone - began, "back_after_s": back_s}, outcomes


def _logged(state: ClusterState) -> list[str]:
    """What Serve's controller logged of its decisions."""
    logs = sorted(Path(state.run_dir).glob("ray/session_[0-9]*/logs/serve/controller_*.log"))
    return [
        # Lines are JSON; what the policy says has no quotes.
        line[line.index(_TOLD) :].partition('"')[0]
        for log in logs
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if _TOLD in line
    ]


class _Watch:
    """Samples of all pools: replicas in any state, and every decision that changed them."""

    def __init__(self, metrics_url: str) -> None:
        self._metrics_url = metrics_url
        self._started = time.monotonic()
        self.samples: list[dict[str, Any]] = []
        self.decisions: list[dict[str, Any]] = []
        self.directions: dict[str, dict[str, float]] = {}
        """How often each pool was made larger, smaller, and neither, by the metric."""
        self._sizes: dict[str, int] = {}

    async def run(self) -> None:
        """Until cancelled."""
        from ray.exceptions import RayError

        while True:
            at_s = time.monotonic() - self._started
            try:
                held, running = await asyncio.to_thread(_replicas)
            except RayError as error:
                logger.warning("no sample of the pools: %s", error)
                held, running = {}, {}
            # While an application is put in place of itself, Serve tells of no deployments.
            if held:
                self.samples.append({"at_s": at_s, "replicas": held, "running": running})
            for decision in await asyncio.to_thread(self._decided):
                if self._sizes.get(decision["pool"]) != decision["replicas"]:
                    self._sizes[decision["pool"]] = decision["replicas"]
                    self.decisions.append({"at_s": at_s, **decision})
            await asyncio.sleep(_SAMPLE_S)

    def _decided(self) -> list[dict[str, Any]]:
        try:
            snapshot = MetricsSnapshot.read(self._metrics_url)
        except RequestError as error:
            logger.warning("no sample of the decisions: %s", error)
            return []
        decided = snapshot.by_label("paceline_autoscaling_replicas", "pool")
        self.directions = {
            pool: snapshot.by_label("paceline_autoscaling_decisions_total", "direction", pool=pool)
            for pool in decided
        }
        return [
            {
                "pool": pool,
                "replicas": int(number),
                "needs": {
                    cause: round(need, 1)
                    for cause, need in snapshot.by_label(
                        "paceline_autoscaling_need_replicas", "cause", pool=pool
                    ).items()
                    if need
                },
            }
            for pool, number in decided.items()
        ]


def _replicas() -> tuple[dict[str, int], dict[str, int]]:
    """By deployment: all that hold a place, starting and draining ones too; and those that run."""
    from ray import serve

    states = {
        name: deployment.replica_states
        for app in serve.status().applications.values()
        for name, deployment in app.deployments.items()
    }
    held = {name: sum(by_state.values()) for name, by_state in states.items()}
    return held, {name: by_state.get("RUNNING", 0) for name, by_state in states.items()}
