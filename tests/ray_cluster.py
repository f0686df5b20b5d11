"""A local Ray with Serve for integration tests: own ports, own HAProxy files, nothing left."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Ports(NamedTuple):
    http: int
    grpc: int


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


@contextmanager
def ray_serve(
    grpc_servicers: tuple[str, ...], *, haproxy: bool, environment: dict[str, str] | None = None
) -> Iterator[Ports]:
    """Start Ray and Serve; stop both and remove their files at the end.

    Serve reads its environment when it is imported, so a process runs one kind of cluster only.
    """
    folder = Path(tempfile.mkdtemp(prefix="pl-", dir="/tmp"))
    http, grpc, metrics, stats = free_ports(4)
    flag = "1" if haproxy else "0"
    os.environ.update(
        {
            "RAY_SERVE_ENABLE_HA_PROXY": flag,
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": flag,
            "RAY_worker_niceness": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "h" / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "h" / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder / "h"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "h" / "state"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
            "RAY_SERVE_LOG_TO_STDERR": "1",
            **(environment or {}),
        }
    )
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, gRPCOptions

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=8,
        object_store_memory=80 << 20,
        _temp_dir=str(folder / "r"),
        configure_logging=False,
        log_to_driver=bool(os.environ.get("PACELINE_TEST_RAY_LOGS")),
    )
    try:
        serve.start(
            http_options=HTTPOptions(host="127.0.0.1", port=http),
            grpc_options=gRPCOptions(
                port=grpc, grpc_servicer_functions=list(grpc_servicers), enable_reflection=True
            ),
        )
        yield Ports(http, grpc)
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


class Broadcaster:
    """Calls a method of every replica of a deployment.

    In throughput mode a handle lives on the event loop it was first used on, so this keeps one.
    """

    def __init__(self, app_name: str) -> None:
        self._app_name = app_name
        self._handles: dict[str, Any] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def __call__(self, deployment: str, method: str, *args: object) -> list[Any]:
        call = asyncio.run_coroutine_threadsafe(self._ask(deployment, method, *args), self._loop)
        return call.result(timeout=30)

    async def _ask(self, deployment: str, method: str, *args: object) -> list[Any]:
        from ray import serve

        if deployment not in self._handles:
            self._handles[deployment] = serve.get_deployment_handle(deployment, self._app_name)
        answers = self._handles[deployment].broadcast(method, *args).results_async()
        return list(await asyncio.wait_for(answers, 10))


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 30.0, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.05)
