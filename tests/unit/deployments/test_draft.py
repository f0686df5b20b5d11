from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import ray
from pydantic import SecretStr

from deployments.config import DraftPoolConfig
from deployments.draft import DraftReplica
from deployments.engine.config import TorchEngineConfig
from deployments.engine.speculation.errors import DrafterDeadError
from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

# Serve calls the hook once; the collector of garbage then makes a coroutine of it in vain.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'DraftReplica.__del__'")
SECRET = SecretStr("pool-secret")


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")


@asynccontextmanager
async def draft_replica(folder: Path) -> AsyncIterator[DraftReplica]:
    """Built and shut down as Serve does it."""
    replica = DraftReplica.__new__(DraftReplica)
    await DraftReplica.__init__(
        replica,
        engine=TorchEngineConfig(model=str(write_tokenizer(folder / "model"))),
        draft=DraftPoolConfig(drafter="suffix", secret=SECRET),
        cache_dir=folder,
    )
    try:
        yield replica
    finally:
        await DraftReplica.__del__(replica)


async def test_serve_learns_of_a_drafter_that_does_not_run(tmp_path: Path) -> None:
    async with draft_replica(tmp_path) as replica:
        replica.check_health()
        assert await replica() == replica.record_replica_metadata()["draft_endpoint"]
    with pytest.raises(DrafterDeadError):
        replica.check_health()
