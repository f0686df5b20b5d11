from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from pydantic import SecretStr

from deployments import target as target_module
from deployments.config import TracingConfig
from deployments.engine.config import TorchEngineConfig
from deployments.engine.speculation.drafters.suffix import SuffixDrafter
from deployments.engine.speculation.types import DraftSampling, SessionSpec
from deployments.target import TargetReplica
from tests.echo_deployments import EchoTarget
from tests.fakes_metrics import exporter_for
from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


class Replica(EchoTarget):
    def __del__(self) -> None:
        """Not when it is collected: the hook is a coroutine, and the test awaits it."""


async def test_the_speculator_s_snapshot_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_module, "current_replica_id", lambda: "r1")
    monkeypatch.setattr(target_module, "_REPORT_PERIOD_S", 0.001)
    exporter = exporter_for(monkeypatch)
    replica = Replica.__new__(Replica)
    await TargetReplica.__init__(
        replica,
        None,
        engine=TorchEngineConfig(model=str(write_tokenizer(tmp_path / "model"))),
        cache_dir=tmp_path,
        kv=None,
        pool_secret=SecretStr(""),
        tracing=TracingConfig(),
    )
    monkeypatch.setattr(SuffixDrafter, "open", lambda *_: 1 / 0)
    spec = SessionSpec(
        session_id=1, request_id="r", tenant="t", token_ids=(1,), sampling=DraftSampling(seed=1)
    )
    replica._split.open(spec)
    failures = ("speculator_events_total", "local_drafter_failed")
    async with asyncio.timeout(60):
        while not exporter.scrape().get(failures):  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await TargetReplica.__del__(replica)
