from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING

from deployments.config import AuthConfig, IngressConfig, TracingConfig, TrafficLogConfig
from deployments.engine.config import TorchEngineConfig
from deployments.ingress import IngressReplica
from deployments.tokenizer import ChatTurn
from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Replica(IngressReplica):
    def __del__(self) -> None:
        """Not when it is collected: the hook is a coroutine, and the test awaits it."""


def tokenizer_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("tokenizer")}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_shutdown_sends_the_last_spans_and_stops_the_threads(tmp_path: Path) -> None:
    others = tokenizer_threads()
    handle = SimpleNamespace(options=lambda **_: handle)
    replica = Replica(
        handle,
        engine=TorchEngineConfig(model=str(write_tokenizer(tmp_path / "model"))),
        cache_dir=tmp_path,
        config=IngressConfig(
            traffic_log=TrafficLogConfig(tenants=("default",), folder=tmp_path / "traffic")
        ),
        auth=AuthConfig(),
        tracing=TracingConfig(exporter="file", file_path=tmp_path / "spans"),
    )
    with replica._guard.call("grpc", "chat", {}) as context:
        pass
    text = "hello " * 1000  # a short one needs no thread
    assert await replica._generation.encode_chat([ChatTurn("user", text)], context)
    assert tokenizer_threads() - others
    with replica._guard.call("http", "chat", {}):
        pass

    await IngressReplica.__del__(replica)

    (path,) = (tmp_path / "spans").iterdir()
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 2
    (logged,) = (tmp_path / "traffic" / "default").iterdir()
    assert json.loads(logged.read_text()) == {"messages": [{"role": "user", "content": text}]}
    await until(lambda: not tokenizer_threads() - others)
