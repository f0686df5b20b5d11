"""A Ray on this machine, and how a command gets a Ray at all: a named one, or one of its own."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterStartError
from cluster.processes import ClusterProcesses
from cluster.ray_environment import HAPROXY_FOLDER, applied, ray_variables
from cluster.state import default_state_dir, secret_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

RAY_SHUTDOWN_S = 6.0
"""That Ray's own end may take."""
END_S = 8.0
"""That ending what it left may take."""
# HAProxy refuses socket paths above 97 characters, and Serve puts a 56-digit folder into them.
_MAX_TEMP_PATH = 14
# Neither KV pages nor weights travel through the object store: the smallest comfortable one.
_OBJECT_STORE_BYTES = 128 << 20
_QUIET = {"logging_level": logging.WARNING, "log_to_driver": False}


@contextmanager
def some_ray(num_cpus: int, on_progress: Callable[[str], None]) -> Iterator[None]:
    """Be a driver of the cluster that ``RAY_ADDRESS`` names, or else of a Ray of our own here.

    Ray must not be imported before. A Ray of our own ends with the context, all of its processes.

    Args:
        num_cpus: that a Ray of our own says to have, if the machine has fewer.
        on_progress: told in a few words what happens.

    Raises:
        ClusterStartError: the named cluster cannot be reached, or Ray does not start.
    """
    address = os.environ.get("RAY_ADDRESS")
    with ExitStack() as stack:
        # Ray prints the errors of its processes, and stdout is for a command's result.
        stack.enter_context(redirect_stdout(sys.stderr))
        try:
            if address:
                on_progress(f"joining the Ray cluster at {address}")
                import ray

                stack.callback(within, RAY_SHUTDOWN_S, "leaving Ray", ray.shutdown)
                ray.init(address=address, **_QUIET)
            else:
                on_progress("starting Ray")
                folder = stack.enter_context(_own_place())
                import ray

                stack.callback(within, RAY_SHUTDOWN_S, "Ray's shutdown", ray.shutdown)
                start_ray(folder, num_cpus=max(num_cpus, os.cpu_count() or 1))
        except Exception as error:
            # Ray raises errors of many unrelated types.
            where = (
                f"the Ray cluster at {address} (RAY_ADDRESS)" if address else "Ray on this machine"
            )
            raise ClusterStartError(f"{where} cannot be used: {error}") from error
        yield


def start_ray(run_dir: Path, **options: Any) -> None:  # noqa: ANN401 - Ray's own
    """Start a Ray with all its files below a folder, under ``ray_variables``."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _temp_dir=str(run_dir / "ray"),
        **_QUIET,
        **options,
    )


@contextmanager
def run_folder(cluster_id: str) -> Iterator[Path]:
    """A folder of a cluster's own, for as long as it runs; short, because it holds unix sockets."""
    base = tempfile.gettempdir()
    if len(base) > _MAX_TEMP_PATH:
        base = "/tmp"  # noqa: S108 - the folder below it is created for this user alone
    path = Path(base) / f"pl-{cluster_id}"
    path.mkdir(mode=0o700)
    (path / HAPROXY_FOLDER).mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def within(timeout_s: float, what: str, action: Callable[[], None]) -> None:
    """Run a shutdown step, and go on without it when it hangs or fails."""

    def run() -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - the root of a thread; the processes are ended
            logger.warning("%s failed: %s", what, error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        logger.warning("%s took longer than %.0f s", what, timeout_s)


@contextmanager
def _own_place() -> Iterator[Path]:
    """Folder and environment of a Ray of our own; its processes are ended at the end."""
    cluster_id = secrets.token_hex(4)
    variables = ray_variables(
        cluster_id=cluster_id, token_path=secret_file(default_state_dir(), "ray-token")
    )
    with ExitStack() as stack:
        folder = stack.enter_context(run_folder(cluster_id))
        stack.enter_context(applied(variables))
        processes = ClusterProcesses(cluster_id, folder)
        stack.callback(processes.end, END_S)
        yield folder
