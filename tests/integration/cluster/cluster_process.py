"""Drives a cluster in a process of its own, and looks at what it leaves behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from cluster.processes import ClusterProcesses
from cluster.state import ClusterState, list_states

ROOT = Path(__file__).resolve().parents[3]
START_TIMEOUT_S = 300.0
EXIT_TIMEOUT_S = 180.0
"""Only ends a test that would otherwise hang; how long a stop may take is the cluster's promise."""


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; reaping them is another process's work."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class ClusterProcess:
    """One command that starts a cluster and keeps it until a signal comes."""

    @staticmethod
    def environment(state_dir: Path) -> dict[str, str]:
        """That of a shell which has none of this project's variables set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PACELINE_", "RAY_"))}
        return kept | {"PACELINE_STATE_DIR": str(state_dir), "PYTHONUNBUFFERED": "1"}

    def __init__(self, command: list[str], state_dir: Path) -> None:
        self._state_dir = state_dir
        self._popen = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=self.environment(state_dir),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.state: ClusterState | None = None

    def _read(self) -> None:
        for line in self._popen.stdout:
            self._lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait_for(self, text: str, timeout_s: float = START_TIMEOUT_S) -> ClusterState:
        """Return the cluster's state once its output has ``text``."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert self._popen.poll() is None, f"ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.output}"
            time.sleep(0.1)
        [self.state] = [s for s in list_states(self._state_dir) if s.pid == self.pid]
        return self.state

    def processes(self) -> list[psutil.Process]:
        return ClusterProcesses(self.state.cluster_id, Path(self.state.run_dir)).find()

    def signal(self, signum: signal.Signals) -> None:
        self._popen.send_signal(signum)

    def wait(self, timeout_s: float = EXIT_TIMEOUT_S) -> int:
        code = self._popen.wait(timeout_s)
        self._reader.join(5)
        return code

    def kill(self) -> None:
        """Last resort of a failed test: leave nothing behind on the machine."""
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()
        if self.state is not None:
            ClusterProcesses(self.state.cluster_id, Path(self.state.run_dir)).end(10)
