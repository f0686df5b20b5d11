"""Mooncake's store over TCP, straight from its wheel: a master, a node that lends memory, a client.

As a module of its own, ``python -m tests.bench.kv.mooncake_peer <master> <bytes>`` is that node.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.bench.peer_environments import unpacked_wheel
from tests.kv_pages import wait_until
from tests.valkey_processes import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

VERSION = "0.3.13.post1"
_MAX_START_S = 30.0
_CLIENT_BYTES = 256 << 20  # for transfers; what it takes is no part of the store
_LEASE_MS = 600_000
_FEW_LOGS = {"GLOG_minloglevel": "2", "MC_LOG_LEVEL": "ERROR"}


class MooncakeClient:
    """Batches of GET into the caller's buffers, which are made known to it once."""

    def __init__(self, store: Any, buffers: Sequence[memoryview]) -> None:
        self._store = store
        self._addresses = [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers]
        self._sizes = [len(buffer) for buffer in buffers]
        for address, size in zip(self._addresses, self._sizes, strict=True):
            _check(store.register_buffer(address, size))

    def put(self, name: str, page: bytes) -> None:
        """Store a page on the other node."""
        _check(self._store.put(name, page))

    def get(self, names: Sequence[str]) -> None:
        """Fill the buffers, one for each name.

        Raises:
            RuntimeError: a page did not come.
        """
        count = len(names)
        got = self._store.batch_get_into(list(names), self._addresses[:count], self._sizes[:count])
        if list(got) != self._sizes[:count]:
            raise RuntimeError(f"Mooncake gave {list(got)}")


@contextmanager
def mooncake_peer(
    buffers: Sequence[memoryview], store_bytes: int
) -> Iterator[MooncakeClient | None]:
    """Its servers and a client; None where its wheel cannot be had or does not start.

    Args:
        buffers: where pages will go.
        store_bytes: that the other node lends.
    """
    with ExitStack() as stack:
        try:
            client = _start(stack, buffers, store_bytes)
        except (OSError, ImportError, RuntimeError, subprocess.CalledProcessError) as exc:
            sys.stderr.write(f"Mooncake {VERSION} is not measured: {exc}\n")
            client = None
        yield client


def _start(stack: ExitStack, buffers: Sequence[memoryview], store_bytes: int) -> MooncakeClient:
    ctypes.CDLL("libibverbs.so.1")  # Debian's libibverbs1: over TCP too nothing starts without it
    os.environ.update(_FEW_LOGS)
    program = _folder() / "mooncake" / "mooncake_master"
    program.chmod(0o755)
    master_port, metrics_port = free_ports(2)
    master = f"127.0.0.1:{master_port}"
    command = [
        str(program),
        f"--rpc_port={master_port}",
        f"--metrics_port={metrics_port}",
        f"--default_kv_lease_ttl={_LEASE_MS}",
    ]
    quiet = subprocess.DEVNULL
    server = stack.enter_context(subprocess.Popen(command, stdout=quiet, stderr=quiet))
    stack.callback(server.kill)
    wait_until(lambda: _answers(master_port), _MAX_START_S)
    command = [sys.executable, "-m", __name__, master, str(store_bytes)]
    lender = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    )
    stack.callback(lender.kill)
    if lender.stdout is None or not lender.stdout.readline():
        raise RuntimeError("its other node has ended")
    store = _store(master, 0)
    stack.callback(store.close)
    return MooncakeClient(store, buffers)


def main() -> None:
    """Lend memory until the standard input ends."""
    master, num_bytes = sys.argv[1], int(sys.argv[2])
    store = _store(master, num_bytes)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    store.close()


def _store(master: str, lent_bytes: int) -> Any:
    path = str(_folder())
    if path not in sys.path:
        sys.path.append(path)
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    [port] = free_ports(1)
    host = f"127.0.0.1:{port}"
    _check(store.setup(host, "P2PHANDSHAKE", lent_bytes, _CLIENT_BYTES, "tcp", "", master))
    return store


def _folder() -> Path:
    return unpacked_wheel("mooncake-transfer-engine-non-cuda", VERSION)


def _answers(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1.0).close()
        return True
    return False


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"Mooncake answered {status}")


if __name__ == "__main__":
    main()
