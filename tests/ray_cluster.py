"""A local Ray with Serve for integration tests: own ports, own HAProxy files, nothing left."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

from cluster.ports import PortLease

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cluster.ports import ClusterPorts


class Ports(NamedTuple):
    http: int
    grpc: int


@contextmanager
def ray_serve(
    grpc_servicers: tuple[str, ...], *, haproxy: bool, environment: dict[str, str] | None = None
) -> Iterator[Ports]:
    """Start Ray and Serve; stop both and remove their files at the end.

    Serve reads its environment when it is imported, so a process runs one kind of cluster only.
    """
    # Of a range from which no outgoing connection gets its port: Serve binds much later.
    locks = Path(tempfile.gettempdir()) / f"paceline-test-ports-{os.getuid()}"
    with ExitStack() as stack:
        lease = PortLease(locks, host="127.0.0.1", http=0, grpc=0, metrics=0)
        ports = stack.enter_context(lease)
        folder = Path(tempfile.mkdtemp(prefix="pl-", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        variables = _variables(folder, ports, haproxy=haproxy) | (environment or {})
        # Else commands that other tests start would inherit them.
        stack.enter_context(patch.dict(os.environ, variables))
        yield from _serve(folder, ports, grpc_servicers)


def _variables(folder: Path, ports: ClusterPorts, *, haproxy: bool) -> dict[str, str]:
    flag = "1" if haproxy else "0"
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": flag,
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": flag,
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "h" / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "h" / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder / "h"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "h" / "state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replica_http[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replica_http[1]),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.replica_grpc[0]),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.replica_grpc[1]),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_LOG_TO_STDERR": "1",
    }


def _serve(folder: Path, ports: ClusterPorts, grpc_servicers: tuple[str, ...]) -> Iterator[Ports]:
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
            http_options=HTTPOptions(host="127.0.0.1", port=ports.http),
            grpc_options=gRPCOptions(
                port=ports.grpc,
                grpc_servicer_functions=list(grpc_servicers),
                enable_reflection=True,
            ),
        )
        yield Ports(ports.http, ports.grpc)
    finally:
        serve.shutdown()
        ray.shutdown()


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


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 120.0, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.05)
