"""The environment that Ray and its children need, set before Ray is imported.

Ray and Ray Serve read most of these variables once, at import, in every process. Whatever starts
them must therefore put them into its own environment first; children inherit them.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.processes import MARKER_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.ports import ClusterPorts

RAY_FLAGS = {
    # Ray runs workers at nice 15, so any neighbour would starve them.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Of every Ray that is ours."""

SERVE_FLAGS = RAY_FLAGS | {
    # HAProxy instead of the Python proxy, and user code, router and gRPC on one event loop.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
}
"""Needed on every node, in a pod as on a laptop."""

HAPROXY_FOLDER = "ha"
"""Below the run folder; as short as can be, because it holds unix sockets."""


def ray_variables(*, cluster_id: str, token_path: Path) -> dict[str, str]:
    """Variables of a Ray on one machine.

    Args:
        cluster_id: marks every process of it.
        token_path: file with Ray's bearer token.
    """
    source_root = str(Path(__file__).resolve().parent.parent)
    python_path = [source_root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return RAY_FLAGS | {
        MARKER_VARIABLE: cluster_id,
        # Workers must import this package even when it runs from a source tree.
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, python_path))),
        # Ray's control plane listens on all interfaces on some ports; without a token anybody on
        # the network could run code. The mode is explicit because Ray otherwise guesses it.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        # Ray's switch for "this machine only": the node's address becomes 127.0.0.1.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def local_environment(
    *, cluster_id: str, run_dir: Path, token_path: Path, ports: ClusterPorts, num_threads: int
) -> dict[str, str]:
    """Variables of one cluster with Serve on one machine.

    Args:
        cluster_id: marks every process of the cluster.
        run_dir: the cluster's own folder; short, because it holds unix sockets.
        token_path: file with Ray's bearer token.
        ports: what the cluster may bind.
        num_threads: arithmetic threads of one process.
    """
    haproxy = run_dir / HAPROXY_FOLDER
    return (
        ray_variables(cluster_id=cluster_id, token_path=token_path)
        | SERVE_FLAGS
        | {
            # HAProxy's files are at one fixed place for all clusters of a machine by default.
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(haproxy / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(haproxy / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(haproxy / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(haproxy),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(haproxy / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_http),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(ports.fallback_grpc),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replica_http[0]),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replica_http[1]),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(ports.replica_grpc[0]),
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(ports.replica_grpc[1]),
            # Serve kills a proxy that needs longer, and the start with it, which waits 60 s anyway.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            # No load balancer stands before a laptop, so nobody must be given time to look away.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
            "OMP_NUM_THREADS": str(num_threads),
        }
    )


@contextmanager
def applied(variables: dict[str, str]) -> Iterator[None]:
    """Set variables for the duration of the context, then put back what was there.

    Raises:
        RuntimeError: Ray Serve was imported before under other flags, which it would keep.
    """
    if "ray.serve._private.constants" in sys.modules:
        flags = SERVE_FLAGS.keys() & variables
        wrong = sorted(name for name in flags if os.environ.get(name) != variables[name])
        if wrong:
            raise RuntimeError(
                f"Ray Serve was imported before {', '.join(wrong)} could be set; "
                "start the cluster first, or set them yourself"
            )
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
