"""A proxy that can lose all bytes: what stands between two machines that cannot reach each other.

``python -m tests.chaos.drafts.proxy PORT`` prints its own port, and passes connections on to
``PORT`` until stdin ends. A line ``drop`` on stdin makes it swallow whatever arrives, also on new
connections, which it still accepts; ``pass`` ends that. Bytes that were swallowed stay lost.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress

_CHUNK_BYTES = 1 << 16


class DroppingProxy:
    """Passes on the bytes of any number of connections.

    Args:
        port: on this machine, where connections lead to.

    Attributes:
        is_dropping: whether bytes that arrive are lost.
        num_lost: bytes that were.
    """

    def __init__(self, port: int) -> None:
        self.is_dropping = False
        self.num_lost = 0
        self._port = port
        self._server: asyncio.Server | None = None

    async def start(self) -> int:
        """Listen; returns the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def stop(self) -> None:
        """Take no more connections."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.close()
            return
        try:
            ways = (self._pump(reader, far_writer), self._pump(far_reader, writer))
            await asyncio.wait(
                [asyncio.ensure_future(way) for way in ways],
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            # Where one end has gone, the other one must learn of it.
            for end in (writer, far_writer):
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                if self.is_dropping:
                    self.num_lost += len(data)
                    continue
                writer.write(data)
                await writer.drain()


async def _main(port: int) -> None:
    proxy = DroppingProxy(port)
    sys.stdout.write(f"{await proxy.start()}\n")
    sys.stdout.flush()
    while line := await asyncio.to_thread(sys.stdin.readline):
        proxy.is_dropping = line.strip() == "drop"
    proxy.stop()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
