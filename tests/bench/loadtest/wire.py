"""What passes between a tool and the server, timed on the wire, against which both tools are held.

A tool's own processes take processor time from a server on the same machine, so two tools in turn
do not meet the same server. What each one saw over what passed on the wire meanwhile is a property
of the tool alone. The server's histograms would not do: what leaves Ray of them are counts of
buckets, and sums made of the buckets' middles.

As a program, ``python -m tests.bench.loadtest.wire <host:port>`` is a relay in front of a server:
it prints its port, and for each line on its stdin what the requests since the last one took. It
ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple, cast
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Seen = dict[str, float]
"""By measure."""

_TEXT = re.compile(rb'"content":"[^"]')
_USAGE = re.compile(rb'"completion_tokens":(\d+)')
_END = b"data: [DONE]"
_LONGEST = 64
"""None of these is longer; what was read last may hold the beginning of one."""


class Timed(NamedTuple):
    """One streamed answer; seconds from the request's first byte."""

    first_s: float
    last_s: float
    num_tokens: int


class AnswerClock:
    """Times the answers of one connection, whose requests come one after the other.

    Args:
        on_answer: told of each answer that came to its end.
        clock: seconds.
    """

    def __init__(
        self, on_answer: Callable[[Timed], None], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._on_answer = on_answer
        self._clock = clock
        self._began: float | None = None
        self._first = self._last = 0.0
        self._num_tokens = 0
        self._rest = b""

    def asked(self) -> None:
        """Bytes of a request pass."""
        if self._began is None:
            self._began, self._first, self._num_tokens = self._clock(), 0.0, 0
            self._rest = b""

    def answered(self, data: bytes) -> None:
        """Bytes of an answer pass."""
        if self._began is None:
            return
        now, seen = self._clock(), self._rest + data
        texts = list(_TEXT.finditer(seen))
        if texts:
            self._first = self._first or now
            self._last = now
        usage = list(_USAGE.finditer(seen))
        if usage:
            self._num_tokens = int(usage[-1][1])
        if _END in seen:
            if self._first:
                began = self._began
                self._on_answer(Timed(self._first - began, self._last - began, self._num_tokens))
            self._began = None
            return
        # Whatever was found whole must not be found again.
        read_to = max((match.end() for match in (*texts, *usage)), default=0)
        self._rest = seen[max(read_to, len(seen) - _LONGEST) :]


class Wire:
    """A relay that runs.

    Attributes:
        url: where to ask instead of the server.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.url = f"http://127.0.0.1:{int(self._line())}"

    def timed(self, num_requests: int, run: Callable[[], Seen]) -> tuple[Seen, Seen]:
        """What a tool saw of its requests, and what passed on the wire.

        Args:
            num_requests: that the tool sends; nobody else may send any.
            run: sends them.

        Raises:
            RuntimeError: not as many answers passed.
        """
        self._take()
        seen = run()
        answers = self._take()
        if len(answers) != num_requests:
            raise RuntimeError(f"{len(answers)} of {num_requests} answers passed on the wire")
        return seen, {
            "mean ms to the first text": 1000 * fmean(each.first_s for each in answers),
            "mean ms to the last text": 1000 * fmean(each.last_s for each in answers),
            "mean ms of a token behind the first": 1000
            * fmean((each.last_s - each.first_s) / (each.num_tokens - 1) for each in answers),
        }

    def _take(self) -> list[Timed]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return [Timed(*each) for each in json.loads(self._line())]

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the relay has ended")
        return line


@contextmanager
def wire(url: str) -> Iterator[Wire]:
    """A relay in front of a server, in a process of its own: its work is in no tool's figures."""
    command = [sys.executable, "-m", __name__, urlsplit(url).netloc]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Wire(process)
        finally:
            process.kill()


class _End(asyncio.Protocol):
    """One end of a relayed connection; what it receives goes to the other."""

    def __init__(self, on_data: Callable[[bytes], None], on_lost: Callable[[], None]) -> None:
        self._on_data, self._on_lost = on_data, on_lost

    def data_received(self, data: bytes) -> None:
        self._on_data(data)

    def connection_lost(self, _: Exception | None) -> None:
        self._on_lost()


class _Client(asyncio.Protocol):
    def __init__(self, server: tuple[str, int], on_answer: Callable[[Timed], None]) -> None:
        self._server = server
        self._clock = AnswerClock(on_answer)
        self._early: list[bytes] = []
        self._far: asyncio.Transport | None = None
        self._dialling: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._near = cast("asyncio.Transport", transport)
        self._dialling = asyncio.get_running_loop().create_task(self._dial())

    def data_received(self, data: bytes) -> None:
        self._clock.asked()
        if self._far is None:
            self._early.append(data)
        else:
            self._far.write(data)

    def connection_lost(self, _: Exception | None) -> None:
        if self._far is not None:
            self._far.close()

    def _answer(self, data: bytes) -> None:
        self._clock.answered(data)
        self._near.write(data)

    async def _dial(self) -> None:
        try:
            self._far, _ = await asyncio.get_running_loop().create_connection(
                lambda: _End(self._answer, self._near.close), *self._server
            )
        except OSError:
            self._near.close()
            return
        self._far.writelines(self._early)
        self._early.clear()
        if self._near.is_closing():
            self._far.close()


async def _relay(host: str, port: int) -> None:
    answers: list[Timed] = []
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Client((host, port), answers.append), "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    while await asyncio.to_thread(sys.stdin.readline):
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()
        answers.clear()
    server.close()


if __name__ == "__main__":
    _host, _, _port = sys.argv[1].rpartition(":")
    asyncio.run(_relay(_host, int(_port)))
