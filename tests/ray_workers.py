"""A training command on Ray, one of whose processes is killed."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_WORKER = "RayTrainWorker"
_POLL_S = 0.05
_REAP_S = 30.0


class KilledOne(NamedTuple):
    """What the command wrote, and processes of it that are still there."""

    stdout: str
    said: str
    left: list[str]


def run_and_kill_one(
    command: Sequence[str], environment: dict[str, str], is_time: Callable[[str], bool]
) -> KilledOne:
    """Run a command to its end; kill a training process of it by SIGKILL on the way.

    Args:
        command: its program and arguments.
        environment: all of it.
        is_time: told what the command said so far, whether to kill now.

    Raises:
        RuntimeError: the command failed, or there was nobody to kill.
    """
    with (
        tempfile.TemporaryFile("w+") as printed,
        tempfile.NamedTemporaryFile("r") as said,
        Path(said.name).open("w") as sink,
        subprocess.Popen(command, stdout=printed, stderr=sink, env=environment) as running,
    ):
        heard = ""
        while running.poll() is None and not is_time(heard):
            time.sleep(_POLL_S)
            heard += said.read()
        family = _descendants(running.pid)
        workers = [process for process in family if _WORKER in _command_of(process)]
        if workers:
            workers[-1].kill()
        running.wait()
        heard += said.read()
        if running.returncode != 0 or not workers:
            raise RuntimeError(f"{len(family)} processes, {len(workers)} of them workers\n{heard}")
        printed.seek(0)
        # What a dead parent left is reaped by another process, in its own time.
        _, alive = psutil.wait_procs(family, timeout=_REAP_S)
        left = [str(process) for process in alive]
        return KilledOne(printed.read(), heard, left)


def _command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it ended meanwhile
        return ""


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
