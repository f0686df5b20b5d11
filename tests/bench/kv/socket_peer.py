"""The limit of any client on loopback: pages over plain sockets, with nothing around them.

As a module of its own, ``python -m tests.bench.kv.socket_peer <page bytes> <pages>`` is the sender:
it prints its port, and for each byte it receives sends that many pages, different ones each time.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class SocketClient:
    """Receives pages over a few connections, a thread each."""

    def __init__(self, port: int, num_connections: int) -> None:
        self._sockets = [
            socket.create_connection(("127.0.0.1", port)) for _ in range(num_connections)
        ]
        self._threads = ThreadPoolExecutor(num_connections)

    def receive(self, buffers: Sequence[memoryview]) -> None:
        """One page into each buffer."""
        share = -(-len(buffers) // len(self._sockets))
        shares = [buffers[start : start + share] for start in range(0, len(buffers), share)]
        list(self._threads.map(self._receive, self._sockets, shares))

    def close(self) -> None:
        """Hang up."""
        for sock in self._sockets:
            sock.close()
        self._threads.shutdown()

    @staticmethod
    def _receive(sock: socket.socket, buffers: Sequence[memoryview]) -> None:
        sock.sendall(bytes([len(buffers)]))
        for buffer in buffers:
            rest = buffer
            while rest:
                rest = rest[sock.recv_into(rest) :]


@contextmanager
def socket_peer(page_bytes: int, num_pages: int, num_connections: int) -> Iterator[SocketClient]:
    """A sender in a process of its own, and its client."""
    command = [sys.executable, "-m", __name__, str(page_bytes), str(num_pages)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None:
                raise RuntimeError("the sender has no output")
            client = SocketClient(int(process.stdout.readline()), num_connections)
            yield client
            client.close()
        finally:
            process.kill()


def main() -> None:
    """Send pages until killed."""
    page_bytes, num_pages = map(int, sys.argv[1:])
    pages = memoryview(os.urandom(page_bytes * num_pages))
    listener = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=_serve, args=(sock, pages, page_bytes), daemon=True).start()


def _serve(sock: socket.socket, pages: memoryview, page_bytes: int) -> None:
    start = 0
    while asked := sock.recv(1):
        for _ in range(asked[0]):
            sock.sendall(pages[start : start + page_bytes])
            start = (start + page_bytes) % len(pages)


if __name__ == "__main__":
    main()
