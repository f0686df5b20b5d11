from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from ray.exceptions import ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError

from deployments import target_probe
from deployments.engine.errors import EngineDeadError
from deployments.target_probe import TargetProbe

if TYPE_CHECKING:
    from deployments.ping import Ping


class Pool:
    """Prefers its first replica, as a router prefers an idle one; None is a well replica."""

    def __init__(self, **replicas: Exception | None) -> None:
        self._replicas = replicas
        self.num_asked = 0

    def options(self, **options: object) -> Pool:
        assert options == {"method_name": "ping"}
        return self

    async def remote(self, ping: Ping) -> str:
        self.num_asked += 1
        for name, error in self._replicas.items():
            if name not in ping.avoid_replicas:
                if error is not None:
                    raise error
                return name
        await asyncio.Event().wait()
        raise AssertionError


def dead(name: str) -> EngineDeadError:
    return EngineDeadError("dead", name)


async def test_one_sick_replica_does_not_make_a_sick_pool() -> None:
    pool = Pool(a=dead("a"), b=dead("b"), c=None)
    assert await TargetProbe(pool).is_ready()
    assert pool.num_asked == 3


@pytest.mark.parametrize(
    "pool",
    [Pool(), Pool(a=dead("a"), b=dead("b")), Pool(a=ActorUnavailableError("gone", None))],
)
async def test_a_pool_without_a_well_replica_is_not_ready(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_probe, "_PROBE_TIMEOUT_S", 0.2)
    assert not await TargetProbe(pool).is_ready()


async def test_a_deployment_that_failed_is_not_asked_again() -> None:
    pool = Pool(a=DeploymentUnavailableError("target"))  # type: ignore[arg-type]
    assert not await TargetProbe(pool).is_ready()
    assert pool.num_asked == 1


async def test_callers_at_the_same_time_share_one_question() -> None:
    pool = Pool(a=None)
    probe = TargetProbe(pool)
    assert await asyncio.gather(*(probe.is_ready() for _ in range(5))) == [True] * 5
    assert pool.num_asked == 1
