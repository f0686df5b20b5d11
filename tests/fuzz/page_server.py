"""``make fuzz-kv``: bytes between a page server and its readers, damaged on either side.

What a server receives never crashes its session, gets a page only behind the right token, and
changes nothing; each page it gives is the one named. What a reader receives is a reply of at most
the announced size, or ends the connection; and what stands in the hot tier is a record or nothing.
A number and a seed always give the same inputs.
"""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING

from kv_store.tiers.page_directory import ServerAddress, read_record
from kv_store.tiers.page_session import PageSession, served_name, take_command
from kv_store.tiers.resp import ErrorReply, ProtocolError, ReplyReader, command
from tests.kv_pages import make_chain, make_layout

if TYPE_CHECKING:
    from kv_store import PageKey

_SAID_EVERY = 100_000
_TOKEN = b"00112233445566778899aabbccddeeff"
_KEYS = make_chain(make_layout(), 4)
_PAGES = {key: b"<%d>" % key.index * (1 + 40 * key.index) for key in _KEYS[:3]}
_MAX_PAGE_BYTES = 1000
_MAX_PENDING_BYTES = 512


class WrongAnswerError(Exception):
    """A server gave what it should not have, or a reader took what it should not have."""


class _Source:
    def contains(self, key: PageKey) -> bool:
        return key in _PAGES

    def read(self, key: PageKey) -> bytes | None:
        return _PAGES.get(key)


def run(num_inputs: int, seed: int = 0) -> dict[str, int]:
    """Try inputs; counts by outcome.

    Raises:
        WrongAnswerError: of what this is about.
    """
    rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    kinds = (_try_session, _try_session, _try_reader, _try_record)
    outcomes: dict[str, int] = {}
    for number in range(num_inputs):
        if number % _SAID_EVERY == 0:
            sys.stderr.write(f"page servers: {number} of {num_inputs}\n")
        outcome = rng.choice(kinds)(rng)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def _try_session(rng: random.Random) -> str:
    """A client's bytes, in pieces."""
    sound, is_sound = _requests(rng)
    data = _damage(sound, rng)
    session = PageSession(_Source(), _TOKEN)
    replies = bytearray()
    broke_off = False
    start = 0
    while start < len(data) and not broke_off:
        end = start + rng.choice((1, 7, 60, 400, len(data)))
        try:
            for reply in session.receive(data[start:end]):
                replies += reply
        except ProtocolError:
            broke_off = True
        if not broke_off and len(session._received) > _MAX_PENDING_BYTES:
            raise WrongAnswerError(f"{len(session._received)} bytes are kept of {data!r}")
        start = end
    if any(page in replies for page in _PAGES.values()) and not session.is_authenticated:
        raise WrongAnswerError(f"a page without the token: {data!r}")
    expected = _expected(data)
    if bytes(replies) != expected:
        raise WrongAnswerError(f"{bytes(replies)!r}, not {expected!r}, to {data!r}")
    if data == sound and broke_off and is_sound:
        raise WrongAnswerError(f"sound requests were refused: {data!r}")
    return "server hung up" if broke_off else "server answered"


def _expected(data: bytes) -> bytes:
    """What follows from the commands by themselves, read at once."""
    pending, replies, is_known = bytearray(data), bytearray(), False
    names = {served_name(key): key for key in _KEYS}
    try:
        while (words := take_command(pending)) is not None:
            kind = words[0].upper()
            if kind == b"AUTH" and len(words) > 1:
                is_known = words[-1] == _TOKEN
                replies += b"+OK\r\n" if is_known else b""
            if not is_known:
                return bytes(replies)
            key = names.get(words[1]) if len(words) == 2 else None
            is_name = key is not None or (len(words) == 2 and _looks_like_a_name(words[1]))
            page = _PAGES.get(key) if key is not None else None
            if kind == b"AUTH" and len(words) > 1:
                continue
            if kind == b"EXISTS" and is_name:
                replies += b":1\r\n" if page is not None else b":0\r\n"
            elif kind == b"GET" and is_name:
                replies += b"$-1\r\n" if page is None else b"$%d\r\n%b\r\n" % (len(page), page)
            elif kind == b"PING":
                replies += b"+PONG\r\n"
            else:
                replies += b"-ERR not a command of a page server\r\n"
    except ProtocolError:
        pass
    return bytes(replies)


def _looks_like_a_name(word: bytes) -> bool:
    head, _, index = word.rpartition(b":")
    digits = b"0123456789abcdef"
    return (
        len(head) == 102
        and head[:4] == b"kv:{"
        and head[36:37] == b":"
        and head[101:] == b"}"
        and not (head[4:36] + head[37:101]).translate(None, digits)
        and 1 <= len(index) <= 9
        and not index.translate(None, digits[:10])
    )


def _try_reader(rng: random.Random) -> str:
    """A server's bytes."""
    sound = b"".join(
        rng.choice(
            (
                b":1\r\n",
                b"$-1\r\n",
                b"+OK\r\n",
                b"-ERR no\r\n",
                b"$%d\r\n%b\r\n" % (len(page := rng.randbytes(rng.randrange(200))), page),
            )
        )
        for _ in range(4)
    )
    source = _Bytes(_damage(sound, rng))
    reader = ReplyReader(source)

    def allocate(size: int) -> memoryview:
        if size > _MAX_PAGE_BYTES:
            raise ProtocolError("too large")
        return memoryview(bytearray(size))

    try:
        for _ in range(4):
            reply = reader.read(allocate)
            if isinstance(reply, memoryview) and len(reply) > _MAX_PAGE_BYTES:
                raise WrongAnswerError(f"{len(reply)} bytes were taken")
            if not isinstance(reply, memoryview | bytes | int | ErrorReply | None):
                raise WrongAnswerError(f"a reply of type {type(reply)}")
    except (ProtocolError, EOFError):
        return "reader hung up"
    return "reader took it"


def _try_record(rng: random.Random) -> str:
    """A record in the hot tier."""
    address = ServerAddress(f"10.0.0.{rng.randrange(256)}", rng.randrange(1, 65536), "ab" * 16)
    record = _damage(address.pack(), rng)
    found = read_record(record)
    if found is None:
        if record == address.pack():
            raise WrongAnswerError("a sound record was refused")
        return "no record"
    if not (0 < found.port < 65536 and len(found.token) == 32 and found.host.isascii()):
        raise WrongAnswerError(f"{record!r} was taken for a record")
    return "record"


def _requests(rng: random.Random) -> tuple[bytes, bool]:
    """Some requests, and whether they must be answered."""
    token = _TOKEN if rng.random() < 0.9 else rng.randbytes(rng.randrange(40))
    requests = [command(b"AUTH", token)] if rng.random() < 0.95 else []
    for _ in range(rng.randrange(5)):
        name = served_name(rng.choice(_KEYS))
        requests.append(
            rng.choice((command(b"GET", name), command(b"EXISTS", name), command(b"PING")))
        )
    data = b"".join(requests)
    return data, data.startswith(command(b"AUTH", _TOKEN))


def _damage(sound: bytes, rng: random.Random) -> bytes:
    data = bytearray(sound)
    kind = rng.randrange(7)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        return bytes(data)
    if kind == 1 and data:
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + rng.randint(1, 20)]
    elif kind == 4:
        data[at:at] = rng.randbytes(rng.randint(1, 20))
    elif kind == 5:
        words = (b"\r\n", b"*", b"$", b"-1", b"999", b"99999999", b"\n", b"kv:{", b"AUTH", b" ")
        data[at:at] = rng.choice(words)
    else:
        data = bytearray(rng.randbytes(rng.randrange(700)))
    return bytes(data)


class _Bytes:
    """A connection that ends."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def receive_some(self, target: memoryview) -> int:
        """See ``ByteSource``."""
        if not self._data:
            raise EOFError
        size = min(len(target), len(self._data))
        target[:size] = self._data[:size]
        self._data = self._data[size:]
        return size

    def receive_all(self, target: memoryview) -> None:
        """See ``ByteSource``."""
        while target:
            target = target[self.receive_some(target) :]
