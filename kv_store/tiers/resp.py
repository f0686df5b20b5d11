"""RESP2 framing of the few commands that move pages; a bulk string lands in the caller's memory.

Protocol: https://valkey.io/topics/protocol. Only what these commands can answer is understood:
``+status``, ``-error``, ``:integer`` and ``$length`` bulk strings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from kv_store.tiers.base import Blob

_STAGING_BYTES = 16 << 10
_MAX_LINE_BYTES = 64 << 10
_MAX_BULK_BYTES = 512 << 20  # the servers' own limit
_CRLF = b"\r\n"


class ProtocolError(Exception):
    """The peer does not speak RESP2; whatever else it sent cannot be trusted."""


class ErrorReply(NamedTuple):
    """The server's refusal of one command."""

    message: str


class ByteSource(Protocol):
    """Where replies come from."""

    def receive_some(self, target: memoryview) -> int:
        """Fill a part of ``target``, at least one byte; return how many."""

    def receive_all(self, target: memoryview) -> None:
        """Fill ``target``."""


def command(*words: bytes) -> bytes:
    """One request."""
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%b\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


def command_with_payload(*words: bytes, payload: Blob, options: tuple[bytes, ...]) -> list[Blob]:
    """One request whose payload is sent from where it lies, between ``words`` and ``options``."""
    count = len(words) + 1 + len(options)
    head = b"*%d\r\n" % count + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)
    tail = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in options)
    return [head + b"$%d\r\n" % len(payload), payload, _CRLF + tail]


class ReplyReader:
    """Reads replies one after another. After any exception the rest of the stream is unusable."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._staged = memoryview(bytearray(_STAGING_BYTES))
        self._start = self._end = 0

    @property
    def is_drained(self) -> bool:
        """Whether nothing was received that has not been read."""
        return self._start == self._end

    def read(self, allocate: Callable[[int], memoryview]) -> Blob | int | ErrorReply | None:
        """One reply: a status, an integer, an error, a bulk string, or None for a null.

        Args:
            allocate: where a bulk string of so many bytes shall go.

        Raises:
            ProtocolError: not RESP2.
        """
        line = self._read_line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            return self._read_bulk(_integer(rest), allocate)
        if kind == b":":
            return _integer(rest)
        if kind == b"+":
            return rest
        if kind == b"-":
            return ErrorReply(rest.decode(errors="replace"))
        raise ProtocolError(f"a reply begins with {kind!r}")

    def read_flags(self, count: int) -> list[bool] | None:
        """``count`` replies that are all 0 or 1, faster than one by one; None if they are not.

        Nothing has been consumed where the answer is None.
        """
        data = bytearray(4 * count)  # no reply is shorter than ``:1`` and a line end
        self._read_into(memoryview(data))
        digits = data[1::4]
        is_regular = (
            data[0::4] == b":" * count
            and data[2::4] == b"\r" * count
            and data[3::4] == b"\n" * count
            and not digits.translate(None, b"01")
        )
        if is_regular:
            return [digit == ord("1") for digit in digits]
        data += self._staged[self._start : self._end]
        self._staged = memoryview(data)
        self._start, self._end = 0, len(data)
        return None

    def _read_bulk(self, length: int, allocate: Callable[[int], memoryview]) -> Blob | None:
        if length == -1:
            return None
        if not 0 <= length <= _MAX_BULK_BYTES:
            raise ProtocolError(f"a bulk string of {length} bytes")
        target = allocate(length)
        self._read_into(target)
        end = bytearray(2)
        self._read_into(memoryview(end))
        if end != _CRLF:
            raise ProtocolError("a bulk string has no end")
        return target

    def _read_line(self) -> bytes:
        line = bytearray()
        while True:
            if self._start == self._end:
                self._receive()
            staged = bytes(self._staged[self._start : min(self._end, self._start + 128)])
            # The line end may be split over two receptions.
            stop = staged.find(b"\n")
            taken = staged if stop < 0 else staged[: stop + 1]
            line += taken
            self._start += len(taken)
            if stop >= 0:
                break
            if len(line) > _MAX_LINE_BYTES:
                raise ProtocolError("a line without end")
        if line[-2:] != _CRLF:
            raise ProtocolError("a line ends with a bare line feed")
        return bytes(line[:-2])

    def _read_into(self, target: memoryview) -> None:
        """What is staged first; a long rest goes straight to the target."""
        num_taken = min(len(target), self._end - self._start)
        target[:num_taken] = self._staged[self._start : self._start + num_taken]
        self._start += num_taken
        rest = target[num_taken:]
        if len(rest) >= _STAGING_BYTES:
            self._source.receive_all(rest)
            return
        while rest:
            self._receive()
            num_taken = min(len(rest), self._end)
            rest[:num_taken] = self._staged[:num_taken]
            self._start = num_taken
            rest = rest[num_taken:]

    def _receive(self) -> None:
        """Stage more; only when all that was staged has been read."""
        if len(self._staged) != _STAGING_BYTES:
            self._staged = memoryview(bytearray(_STAGING_BYTES))
        self._start = 0
        self._end = 0
        self._end = self._source.receive_some(self._staged)


def _integer(text: bytes) -> int:
    try:
        return int(text)
    except ValueError as exc:
        raise ProtocolError(f"not a number: {text[:32]!r}") from exc
