"""Mooncake's store over TCP, straight from its wheel: a master, a node that lends memory, a client.

As a module of its own, ``python -m tests.bench.kv.mooncake_peer <master> <bytes>`` is that node.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VERSION = "0.3.13.post1"
_PACKAGE = "mooncake-transfer-engine-non-cuda"
_FOLDER = Path("build/peers") / f"mooncake-{VERSION}"
_MAX_START_S = 30.0
_CLIENT_BYTES = 256 << 20  # for transfers; what it takes is no part of the store
_LEASE_MS = 600_000
_NO_LOGS = {"GLOG_minloglevel": "3", "MC_LOG_LEVEL": "ERROR"}


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
    try:
        ctypes.CDLL(
            "libibverbs.so.1"
        )  # Debian's libibverbs1; over TCP too it does not start without
        _unpack()
    except (OSError, LookupError, subprocess.CalledProcessError) as exc:
        sys.stderr.write(f"Mooncake {VERSION} is not measured: {exc}\n")
        yield None
        return
    os.environ.update(_NO_LOGS)
    master_port = _free_port()
    master = f"127.0.0.1:{master_port}"
    command = [
        str((_FOLDER / "mooncake" / "mooncake_master").absolute()),
        f"--rpc_port={master_port}",
        f"--metrics_port={_free_port()}",
        f"--default_kv_lease_ttl={_LEASE_MS}",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server:
        try:
            _wait_for(master_port)
            lender_command = [sys.executable, "-m", __name__, master, str(store_bytes)]
            with subprocess.Popen(
                lender_command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            ) as lender:
                try:
                    if lender.stdout is None or not lender.stdout.readline():
                        raise RuntimeError("Mooncake's other node has ended")
                    store = _store(master, 0)
                    yield MooncakeClient(store, buffers)
                    store.close()
                finally:
                    lender.kill()
        finally:
            server.kill()


def main() -> None:
    """Lend memory until the standard input ends."""
    master, num_bytes = sys.argv[1], int(sys.argv[2])
    store = _store(master, num_bytes)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    store.close()


def _store(master: str, lent_bytes: int) -> Any:
    path = str(_FOLDER.absolute())
    if path not in sys.path:
        sys.path.append(path)
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    host = f"127.0.0.1:{_free_port()}"
    _check(store.setup(host, "P2PHANDSHAKE", lent_bytes, _CLIENT_BYTES, "tcp", "", master))
    return store


def _unpack() -> None:
    if (_FOLDER / "mooncake").is_dir():
        return
    _FOLDER.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "-d", str(_FOLDER), f"{_PACKAGE}=={VERSION}"]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = _FOLDER.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(_FOLDER)
    (_FOLDER / "mooncake" / "mooncake_master").chmod(0o755)
    wheel.unlink()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_for(port: int) -> None:
    until = time.monotonic() + _MAX_START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"Mooncake answered {status}")


if __name__ == "__main__":
    main()
