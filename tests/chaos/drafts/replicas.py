"""Draft replicas in processes of their own, that can be killed, frozen, cut off, and changed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from deployments.draft_sessions import ENDPOINT_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_NOTICED_AFTER_S = 1.0
"""A dead replica is still offered for so long, until Serve has noticed."""
_POLL_S = 0.02


class Replica:
    """A draft server, and the proxy before it that targets dial."""

    def __init__(self, name: str, drafter: str) -> None:
        """Start, and wait until it listens."""
        self.name = name
        self.num_held = 0
        self._drafter = drafter
        self._died_at: float | None = None
        self._start()

    @property
    def endpoint(self) -> str:
        """Where targets dial it."""
        return f"127.0.0.1:{self._port}"

    @property
    def is_offered(self) -> bool:
        """Whether Serve's router would choose it."""
        return self._died_at is None or time.monotonic() < self._died_at + _NOTICED_AFTER_S

    def kill(self) -> None:
        """SIGKILL; returns when it is dead."""
        self._server.kill()
        self._server.wait()
        self._died_at = time.monotonic()

    def restart(self) -> None:
        """A new process at a new endpoint, as Serve starts one in the place of a dead one."""
        self._stop_proxy()
        self._start()
        self._died_at = None

    def freeze(self) -> None:
        """SIGSTOP."""
        self._server.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._server.send_signal(signal.SIGCONT)

    def cut(self) -> None:
        """From now on all bytes from and to it are lost."""
        _tell(self._proxy, "drop")

    def mend(self) -> None:
        """Bytes pass again."""
        _tell(self._proxy, "pass")

    def swap(self) -> None:
        """Another drafter takes over while it serves; returns when it has."""
        _tell(self._server, self._drafter)
        assert self._server.stdout is not None
        self._server.stdout.readline()

    def stop(self) -> None:
        """End both processes. Idempotent."""
        self._stop_proxy()
        self._server.kill()
        self._server.wait()

    def _start(self) -> None:
        pool = ("tests.bench.split.pool", "--drafter", self._drafter, "--threads", "1")
        self._server = _spawn(*pool)
        port = _read_line(self._server)
        self._proxy = _spawn("tests.chaos.drafts.proxy", port)
        self._port = int(_read_line(self._proxy))

    def _stop_proxy(self) -> None:
        self._proxy.kill()
        self._proxy.wait()


class Selection(NamedTuple):
    """As ``ReplicaSelection``."""

    replica_id: str
    replica_metadata: dict[str, Any]


class Pool:
    """In the place of Serve's handle: of those offered gives the replica with fewest sequences."""

    def __init__(self, replicas: list[Replica]) -> None:
        self._replicas = replicas

    @asynccontextmanager
    async def choose_replica(self) -> AsyncIterator[Selection]:
        """Hold a slot of one replica; waits while none is offered."""
        while not (offered := [each for each in self._replicas if each.is_offered]):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        replica = min(offered, key=lambda each: each.num_held)
        replica.num_held += 1
        try:
            yield Selection(replica.name, {ENDPOINT_KEY: replica.endpoint})
        finally:
            replica.num_held -= 1


def _spawn(module: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def _read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"{process.args} ended with status {process.wait()}")
    return line
