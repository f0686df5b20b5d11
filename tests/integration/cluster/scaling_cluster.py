"""A cluster of simulated engines that scales under closed-loop clients and is updated meanwhile.

As a script (``python -m ... MODEL_FOLDER``) it prints what happened as JSON on its last line.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import httpx

from cluster.config import (
    AutoscaleConfig,
    ClusterConfig,
    PoolConfig,
    PoolsConfig,
    ServerConfig,
)
from cluster.local_cluster import LocalCluster
from cluster.metrics_reader import MetricsSnapshot
from cluster.serve_app import paceline_app
from deployments.engine.config import EngineConfig, SimulatedConfig, SpeculationConfig

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_CLIENTS = 12
NUM_TOKENS = 24
_CONDITION_S = 240.0
_REQUEST_S = 200.0


def config(folder: str, *, draft_row_s: float = 0.0005) -> ClusterConfig:
    scaled = AutoscaleConfig(
        max_replicas=3,
        target_ongoing_requests=4,
        upscale_delay_s=2,
        downscale_delay_s=4,
        look_back_s=3,
    )
    simulated = SimulatedConfig(decode_step_s=((1, 0.02), (40, 0.05)), draft_row_s=draft_row_s)
    return ClusterConfig(
        engine=EngineConfig(
            kind="simulated",
            model=folder,
            served_model_name="simulated",
            max_num_seqs=8,
            speculation=SpeculationConfig(local_drafter="none"),
            simulated=simulated,
        ),
        kv=None,
        pools=PoolsConfig(
            target=PoolConfig(
                autoscaling=scaled, max_ongoing_requests=16, num_cpus=0.5, max_surge_percent=100
            ),
            draft=PoolConfig(
                autoscaling=scaled.model_copy(update={"min_replicas": 0}),
                num_cpus=0.5,
                max_surge_percent=100,
            ),
        ),
        server=ServerConfig(http_port=0, grpc_port=0),
    )


class Clients:
    """Each asks the same again and again; whatever ends is counted."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=_REQUEST_S)
        self.outcomes: Counter[str] = Counter()
        self.texts: set[str] = set()
        self.num_wanted = 0

    async def one(self, index: int) -> None:
        while index < self.num_wanted:
            try:
                outcome = await self._ask()
            except httpx.HTTPError as error:
                outcome = f"{type(error).__name__}: {error}"
            self.outcomes[outcome] += 1

    async def _ask(self) -> str:
        body = {
            "model": "simulated",
            "prompt": "abcdefgh",
            "max_tokens": NUM_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        }
        response = await self._http.post("/v1/completions", json=body)
        if response.status_code != httpx.codes.OK:
            return f"{response.status_code}: {response.text}"
        answer = response.json()
        self.texts.add(answer["choices"][0]["text"])
        return f"{answer['usage']['completion_tokens']} tokens"


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _CONDITION_S
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {_CONDITION_S} s: {what}")
        await asyncio.sleep(0.5)


def num_running(pool: str) -> int:
    from ray import serve

    applications = serve.status().applications.values()
    states = [app.deployments[pool].replica_states for app in applications]
    return sum(state.get("RUNNING", 0) for state in states)


def num_held(pool: str) -> int:
    """Those that start or drain as well."""
    from ray import serve

    applications = serve.status().applications.values()
    return sum(sum(app.deployments[pool].replica_states.values()) for app in applications)


def decided(metrics_url: str) -> dict[str, float]:
    snapshot = MetricsSnapshot.read(metrics_url)
    return snapshot.by_label("paceline_autoscaling_replicas", "pool")


async def live(cluster: LocalCluster, folder: str) -> dict[str, Any]:
    clients = Clients(cluster.state.http_url)
    clients.num_wanted = NUM_CLIENTS
    async with asyncio.TaskGroup() as group:
        for index in range(NUM_CLIENTS):
            group.create_task(clients.one(index))
        try:
            await until(lambda: num_running("target") >= 2, "the target pool grows")
            await until(lambda: num_running("draft") >= 1, "drafts are made")
            await asyncio.to_thread(cluster.replace, config(folder, draft_row_s=0.0006))
            num_before = clients.outcomes.total()
            await until(lambda: clients.outcomes.total() > num_before, "answers go on")
            clients.num_wanted = 1
            await until(lambda: num_held("target") == 1, "the target pool shrinks")
        finally:
            clients.num_wanted = 0
    await until(lambda: num_held("draft") == 0, "nobody drafts for nobody")
    # Metrics follow some seconds later.
    url = cluster.state.metrics_url
    await until(lambda: decided(url) == {"target": 1, "draft": 0}, "decisions are told")
    snapshot = await asyncio.to_thread(MetricsSnapshot.read, url)
    return {
        "outcomes": clients.outcomes,
        "num_texts": len(clients.texts),
        "needs": snapshot.by_label("paceline_autoscaling_need_replicas", "cause", pool="target"),
        "directions": snapshot.by_label(
            "paceline_autoscaling_decisions_total", "direction", pool="target"
        ),
    }


def main() -> int:
    folder = sys.argv[1]
    with LocalCluster(config(folder), paceline_app(), on_progress=print) as cluster:
        told = asyncio.run(live(cluster, folder))
    sys.stdout.write(json.dumps(told) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
