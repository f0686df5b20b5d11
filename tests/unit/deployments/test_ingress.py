from __future__ import annotations

import asyncio
import json
import threading
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from deployments.config import (
    AuthConfig,
    IngressConfig,
    TenantConfig,
    TracingConfig,
    TrafficLogConfig,
)
from deployments.ingress import IngressReplica
from deployments.tokenizer import ChatTurn
from tests.fakes_ingress import echo_ingress, http_client

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def tokenizer_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("tokenizer")}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_shutdown_sends_the_last_spans_and_stops_the_threads(tmp_path: Path) -> None:
    others = tokenizer_threads()
    replica = echo_ingress(
        tmp_path,
        config=IngressConfig(
            traffic_log=TrafficLogConfig(tenants=("default",), folder=tmp_path / "traffic")
        ),
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


AUTH = AuthConfig(
    cluster_secret=SecretStr("a cluster secret of some length"),
    tenants=(TenantConfig(name="one", api_keys=(SecretStr("key"),), max_concurrent_requests=1),),
)
HEADERS = {"authorization": "Bearer key"}
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


class Upload:
    """A request over ASGI whose body never comes to its end."""

    def __init__(self, replica: IngressReplica, path: str, **headers: str) -> None:
        self._app = replica.__serve_build_asgi_app__()
        named = {"authorization": "Bearer key"} | headers
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
        }
        self.is_read = asyncio.Event()
        self.disconnected = asyncio.Event()
        self._status = 0

    async def status(self) -> int:
        await self._app(self.scope, self._receive, self._send)
        return self._status

    async def _receive(self) -> dict[str, object]:
        if not self.is_read.is_set():
            self.is_read.set()
            return {"type": "http.request", "body": b"{", "more_body": True}
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, int]) -> None:
        self._status = message.get("status", self._status)


@pytest.mark.parametrize("path", PATHS)
async def test_an_upload_counts_against_its_tenant(tmp_path: Path, path: str) -> None:
    replica = echo_ingress(tmp_path, auth=AUTH)
    upload = Upload(replica, path)
    task = asyncio.create_task(upload.status())
    await upload.is_read.wait()
    async with http_client(replica) as http:
        assert (await http.post(path, headers=HEADERS, json={})).status_code == 429
        upload.disconnected.set()
        await task
        assert (await http.post(path, headers=HEADERS, json={})).status_code == 400


@pytest.mark.parametrize("path", PATHS)
async def test_an_upload_ends_at_the_deadline(tmp_path: Path, path: str) -> None:
    upload = Upload(echo_ingress(tmp_path, auth=AUTH), path, **{"x-paceline-timeout": "0.05"})
    assert await asyncio.wait_for(upload.status(), 60) == 504


@pytest.mark.parametrize("path", PATHS)
async def test_a_client_that_leaves_during_its_upload_is_no_fault(
    tmp_path: Path, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    upload = Upload(echo_ingress(tmp_path, auth=AUTH), path)
    upload.disconnected.set()
    assert await upload.status() == 499
    assert not caplog.records


async def test_a_stream_holds_its_place_to_its_end(tmp_path: Path) -> None:
    replica = echo_ingress(tmp_path, auth=AUTH)
    body = json.dumps({"model": "m", "prompt": "x", "max_tokens": 3, "stream": True}).encode()
    held = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body}

    async def send(message: dict[str, object]) -> None:
        if message.get("body"):
            held.append(replica._guard._gate.num_in_flight)

    scope = Upload(replica, "/v1/completions").scope
    await replica.__serve_build_asgi_app__()(scope, receive, send)
    assert len(held) > 3
    assert set(held) == {1}
    assert replica._guard._gate.num_in_flight == 0
