"""A whole cluster on one machine, for the length of a ``with`` block.

Order of life: ports, Valkey, Ray, Serve, replicas, ready; and back again. Valkey starts before Ray
so that replicas find it, and stops after it so that their last pages still get there. Whatever
happens in between, leaving the block ends every process of the cluster within ``STOP_TIMEOUT_S``.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from pydantic import SecretStr

from cluster.autoscaling import application_policy
from cluster.errors import ClusterStartError
from cluster.hot_tier import hot_tier, hot_tier_address, ssd_roots
from cluster.kept_logs import keep_logs
from cluster.local_ray import END_S, RAY_SHUTDOWN_S, run_folder, start_ray, within
from cluster.manifest import serve_logging
from cluster.pools import engine_threads, machine_resources
from cluster.ports import PortLease
from cluster.processes import ClusterProcesses
from cluster.ray_environment import applied, local_environment
from cluster.readiness import wait_until_ready
from cluster.serve_deploy import deploy
from cluster.signals import begin_stop, check_stop_requested, sigterm_handler_kept
from cluster.state import (
    ClusterState,
    default_state_dir,
    end_stale_clusters,
    remove_state,
    secret_file,
    write_state,
)
from deployments.model_files import served_model_name

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from cluster.config import ClusterConfig
    from cluster.ports import ClusterPorts
    from cluster.serve_app import ServedApp

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 30.0
"""From the first signal until nothing is left."""
_DRAIN_S = 12.0


class LocalCluster:
    """Starts a cluster on this machine and takes it down again, completely."""

    def __init__(
        self,
        config: ClusterConfig,
        app: ServedApp,
        *,
        state_dir: Path | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        """Describe the cluster; nothing starts yet.

        Args:
            config: the settings.
            app: what to deploy.
            state_dir: where the cluster is announced; the user's state folder by default.
            on_progress: told in a few words what happens next.
        """
        self._config = config
        self._app = app
        self._state_dir = state_dir or default_state_dir()
        self._progress = on_progress or logger.info
        self._stack = ExitStack()
        self._state: ClusterState | None = None
        self._num_left: int | None = 0
        self._running: ClusterConfig | None = None

    @property
    def state(self) -> ClusterState:
        """Addresses of the running cluster.

        Raises:
            RuntimeError: the cluster is not running.
        """
        if self._state is None:
            raise RuntimeError("the cluster is not running")
        return self._state

    @property
    def num_processes_left(self) -> int:
        """Processes that outlived the stop, counted at its end; 0 before the first one starts.

        Raises:
            RuntimeError: the cluster was not stopped yet.
        """
        if self._num_left is None:
            raise RuntimeError("the cluster was not stopped yet")
        return self._num_left

    def __enter__(self) -> Self:
        """Start and wait until every replica is ready.

        Raises:
            PortInUseError: a configured port is taken; nothing was started.
            ClusterStartError: a part did not become ready; everything was ended again.
        """
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            begin_stop()
        finally:
            self._stack.close()
            self._state = None

    def _start(self) -> None:
        server = self._config.server
        if ended := end_stale_clusters(self._state_dir):
            self._progress(f"ended the remains of {ended} cluster(s) that had died")
        ports = self._stack.enter_context(
            PortLease(
                self._state_dir / "locks",
                host=server.host,
                http=server.http_port,
                grpc=server.grpc_port,
                metrics=server.metrics_port,
            )
        )
        cluster_id = secrets.token_hex(4)
        run_dir = self._stack.enter_context(run_folder(cluster_id))
        processes = ClusterProcesses(cluster_id, run_dir)
        variables = local_environment(
            cluster_id=cluster_id,
            run_dir=run_dir,
            # One for all of the user's clusters: Ray caches it for the life of a process.
            token_path=secret_file(self._state_dir, "ray-token"),
            ports=ports,
            num_threads=engine_threads(self._config),
        )
        self._stack.enter_context(applied(variables))
        # Closed in the reverse order: Serve and Ray, then Valkey, then whatever is still there.
        self._stack.callback(self._end_processes, processes, cluster_id)
        self._num_left = None
        config = _with_secret(self._config, self._state_dir)
        config = self._stack.enter_context(hot_tier(config, run_dir, self._progress))
        self._state = self._describe(cluster_id, run_dir, ports, config)
        write_state(self._state_dir, self._state)
        try:
            self._start_ray(run_dir, ports)
            check_stop_requested()
            self._start_serve(ports)
            check_stop_requested()
            processes.remember()
            self._deploy(config)
        except Exception as error:
            check_stop_requested()
            logs = keep_logs(run_dir, self._state_dir, cluster_id)
            where = f"\nlogs: {logs}" if logs else ""
            # Ray raises errors of many unrelated types; the reader needs the last line of them.
            raise ClusterStartError(f"{_last_words(error)}{where}") from error
        processes.remember()

    def _start_ray(self, run_dir: Path, ports: ClusterPorts) -> None:
        machine = machine_resources(self._config.pools)
        self._progress("starting Ray")
        import ray

        self._stack.callback(within, RAY_SHUTDOWN_S, "Ray's shutdown", ray.shutdown)
        with sigterm_handler_kept():
            start_ray(
                run_dir,
                num_cpus=machine.num_cpus,
                resources=machine.resources or None,
                labels=machine.labels or None,
                _metrics_export_port=ports.metrics,
            )

    def _start_serve(self, ports: ClusterPorts) -> None:
        self._progress("starting Ray Serve and HAProxy")
        from ray import serve

        # Progress is told once, by this class.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._stack.callback(within, _DRAIN_S, "Ray Serve's shutdown", serve.shutdown)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": self._config.server.host, "port": ports.http},
            grpc_options={
                "port": ports.grpc,
                "grpc_servicer_functions": list(self._app.grpc_servicer_functions),
            },
            logging_config=serve_logging(self._config),
        )

    def replace(self, config: ClusterConfig) -> None:
        """Put the running application's replicas on other settings, one after the other.

        Pools must have ``autoscaling``; ports and tiers stay what they are.

        Args:
            config: as the cluster was started with, but for what is to be changed.

        Raises:
            ClusterStartError: the new replicas do not become ready.
        """
        running = self._running
        if running is None or application_policy(config) is None:
            raise RuntimeError("the cluster is not running, or none of its pools has autoscaling")
        self._deploy(config.model_copy(update={"kv": running.kv, "auth": running.auth}))

    def _deploy(self, config: ClusterConfig) -> None:
        self._progress("starting replicas")
        deploy(self._app, config, Path(self.state.run_dir))
        self._running = config
        wait_until_ready(
            config.app_name,
            f"{self.state.http_url}/-/healthz",
            timeout_s=config.server.start_timeout_s,
            on_progress=self._progress,
        )

    def _describe(
        self, cluster_id: str, run_dir: Path, ports: ClusterPorts, config: ClusterConfig
    ) -> ClusterState:
        host = self._config.server.host
        reachable = "127.0.0.1" if host in {"", "0.0.0.0"} else host  # noqa: S104 - compared
        return ClusterState(
            cluster_id=cluster_id,
            pid=os.getpid(),
            pid_started=psutil.Process().create_time(),
            run_dir=str(run_dir),
            http_url=f"http://{reachable}:{ports.http}",
            grpc_address=f"{reachable}:{ports.grpc}",
            metrics_url=f"http://127.0.0.1:{ports.metrics}/metrics",
            model=served_model_name(self._config.engine),
            kv_address=hot_tier_address(config),
            ssd_roots=ssd_roots(config),
            started=time.time(),
        )

    def _end_processes(self, processes: ClusterProcesses, cluster_id: str) -> None:
        self._progress("ending what is left")
        self._num_left = processes.end(END_S)
        # While something is left, the next start must be able to find it.
        if not self._num_left:
            remove_state(self._state_dir, cluster_id)


def _with_secret(config: ClusterConfig, state_dir: Path) -> ClusterConfig:
    """Give a cluster without a secret this user's own, so that stored pages outlive a restart."""
    if config.auth.cluster_secret.get_secret_value():
        return config
    secret = SecretStr(secret_file(state_dir, "cluster-secret").read_text())
    auth = config.auth.model_copy(update={"cluster_secret": secret})
    return config.model_copy(update={"auth": auth})


def _last_words(error: Exception) -> str:
    if isinstance(error, ClusterStartError):
        return str(error)
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"the cluster did not start: {lines[-1].strip()}"
