"""A local Ray with Serve for integration tests: own ports, own HAProxy files, nothing left."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 30.0, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what}")
        time.sleep(0.05)
