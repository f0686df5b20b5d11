"""What a page server understands: four commands of RESP, each small, from one client.

    AUTH token          must come first                    +OK
    EXISTS name         whether a page is held             :1 or :0
    GET name            its bytes                          $length ... or $-1
    PING                                                   +PONG

A name is ``kv:{<namespace id>:<page hash>}:<index>``, hex, hex and decimal. The protocol is a
subset of Valkey's (https://valkey.io/topics/protocol), so that one data path reads from both.
Nothing is written, and nothing but a page is read. What breaks the protocol ends the connection.
"""

from __future__ import annotations

import hmac
import re
from typing import TYPE_CHECKING, Protocol

from kv_store.keys import PageKey
from kv_store.tiers.resp import ProtocolError
from kv_store.tiers.valkey_batches import page_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kv_store.tiers.base import Blob

MAX_COMMAND_BYTES = 512
_MAX_WORDS = 3
_NAME = re.compile(rb"kv:\{([0-9a-f]{32}):([0-9a-f]{64})\}:([0-9]{1,9})")
_NUMBER = re.compile(rb"[0-9]{1,3}")
_CRLF = b"\r\n"
_MAX_LINE_BYTES = len(b"*999\r\n")


class PageSource(Protocol):
    """Where a server finds pages. Called from its threads."""

    def contains(self, key: PageKey) -> bool:
        """Whether the page is held."""

    def read(self, key: PageKey) -> Blob | None:
        """The page's bytes as stored, or None."""


def served_name(key: PageKey) -> bytes:
    """What a page server calls a page."""
    return b"%b:%d" % (page_name(key), key.index)


def parse_served_name(name: bytes) -> PageKey | None:
    """The page that a name stands for; None if it is no such name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    namespace_id, page_hash, index = match.groups()
    return PageKey(
        bytes.fromhex(namespace_id.decode()), bytes.fromhex(page_hash.decode()), int(index)
    )


class PageSession:
    """One connection's state. Does no IO but the source's; used by one thread."""

    def __init__(self, source: PageSource, token: bytes) -> None:
        """Begin.

        Args:
            source: of the pages.
            token: what a client must know.
        """
        self._source = source
        self._token = token
        self._received = bytearray()
        self.is_authenticated = False
        self.num_served = 0

    def receive(self, data: bytes | memoryview) -> Iterator[Blob]:
        """Take what has arrived and give the replies to all commands that are whole, in order.

        Raises:
            ProtocolError: the connection is of no use any more; what was given before is valid.
        """
        self._received += data
        while (words := take_command(self._received)) is not None:
            yield from self._reply(words)

    def _reply(self, words: list[bytes]) -> Iterator[Blob]:
        kind, arguments = words[0].upper(), words[1:]
        if kind == b"AUTH" and arguments:
            if not hmac.compare_digest(arguments[-1], self._token):
                raise ProtocolError("a wrong token")
            self.is_authenticated = True
            yield b"+OK\r\n"
            return
        if not self.is_authenticated:
            raise ProtocolError("a command before AUTH")
        key = parse_served_name(arguments[0]) if len(arguments) == 1 else None
        if kind == b"EXISTS" and key is not None:
            yield b":1\r\n" if self._source.contains(key) else b":0\r\n"
        elif kind == b"GET" and key is not None:
            blob = self._source.read(key)
            if blob is None:
                yield b"$-1\r\n"
                return
            self.num_served += 1
            yield b"$%d\r\n" % len(blob)
            yield blob
            yield _CRLF
        elif kind == b"PING":
            yield b"+PONG\r\n"
        else:
            yield b"-ERR not a command of a page server\r\n"


def take_command(received: bytearray) -> list[bytes] | None:
    """Remove the first command from what was received; None if it is not whole yet.

    Raises:
        ProtocolError: these bytes are no beginning of a command.
    """
    num_words, at = _number_line(received, 0, b"*")
    if num_words is None:
        return None
    if not 1 <= num_words <= _MAX_WORDS:
        raise ProtocolError(f"a command of {num_words} words")
    words: list[bytes] = []
    for _ in range(num_words):
        length, start = _number_line(received, at, b"$")
        if length is None:
            return None
        at = start + length + len(_CRLF)
        if at > MAX_COMMAND_BYTES:
            raise ProtocolError("a command is too long")
        if len(received) < at:
            return None
        if received[start + length : at] != _CRLF:
            raise ProtocolError("a word has no end")
        words.append(bytes(received[start : start + length]))
    del received[:at]
    return words


def _number_line(received: bytearray, start: int, kind: bytes) -> tuple[int | None, int]:
    """The number of a line such as ``$12``, and where the next one begins; None if it is short."""
    end = received.find(_CRLF, start, start + _MAX_LINE_BYTES)
    if end < 0:
        if len(received) - start >= _MAX_LINE_BYTES:
            raise ProtocolError("not a command")
        return None, start
    if received[start : start + 1] != kind or not _NUMBER.fullmatch(received, start + 1, end):
        raise ProtocolError("not a command")
    return int(received[start + 1 : end]), end + len(_CRLF)
