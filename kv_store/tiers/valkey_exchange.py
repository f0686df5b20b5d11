"""What one connection is asked: pages by name, pipelined, under one deadline.

An answer may be a ``Redirect`` in place of a result: in a cluster, a slot can move to another node
at any moment. Whoever asked then asks there.
"""

from __future__ import annotations

from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from redis.exceptions import AskError, MovedError

from kv_store.errors import TierRefusedError
from kv_store.tiers.base import Blob
from kv_store.tiers.parts import Manifest, is_split, read_manifest, split
from kv_store.tiers.resp import (
    ErrorReply,
    ProtocolError,
    ReplyReader,
    command,
    command_with_payload,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kv_store.tiers.buffers import BufferPool
    from kv_store.tiers.valkey_connection import ValkeyConnection

MAX_VALUE_BYTES = 2 << 20
# Of values asked for beyond the one that arrives: a round trip's worth on a fast network.
_BYTES_AHEAD = 1 << 20
_MAX_WORD_BYTES = 64 << 10  # of a claim, a note, or what a script returns
CLAIM_SUFFIX = b":claim"
NOTE_SUFFIX = b":at"

T = TypeVar("T")

_ASKING = command(b"ASKING")
# What a server answers that is no longer the one to ask; whoever connects anew finds the right one.
_WRONG_SERVER = ("READONLY", "MASTERDOWN", "LOADING")


def claim_name(name: bytes) -> bytes:
    """Where a page's claim lies; in a cluster, beside it."""
    return name + CLAIM_SUFFIX


class Redirect(NamedTuple):
    """A cluster node's answer that another node has the key.

    Attributes:
        slot: the key's hash slot.
        host: empty if the node does not know it: then the host that answered.
        is_ask: for this one command only, while the slot is being moved.
    """

    slot: int
    host: str
    port: int
    is_ask: bool


class PageWrite(NamedTuple):
    """One page to be stored."""

    name: bytes
    blob: Blob
    ttl_ms: int


class PageRead(NamedTuple):
    """One page to be fetched; its time to live starts anew."""

    name: bytes
    ttl_ms: int


class Evaluation(NamedTuple):
    """A script to be run on one key; it returns a string."""

    script: bytes
    name: bytes
    arguments: tuple[bytes, ...]


class Exchange:
    """One operation's talk with one server, in one thread."""

    def __init__(
        self,
        connection: ValkeyConnection,
        buffers: BufferPool,
        deadline: float,
        *,
        is_asking: bool = False,
    ) -> None:
        """Prepare.

        Args:
            connection: nobody else uses it meanwhile.
            buffers: where blobs are read to.
            deadline: on the monotonic clock.
            is_asking: the commands follow redirects of a slot that is being moved.
        """
        self._connection = connection
        self._buffers = buffers
        self._deadline = deadline
        self._is_asking = is_asking

    def get(self, reads: Sequence[PageRead]) -> list[Blob | Redirect | None]:
        """Each blob, or None for a miss."""
        values = self._fetch([_getex(read.name, read.ttl_ms)] for read in reads)
        return [
            value if isinstance(value, Redirect) else self._join(read, value)
            for read, value in zip(reads, values, strict=True)
        ]

    def put(
        self, writes: Sequence[PageWrite], find_cuts: Callable[[Blob], Sequence[int]]
    ) -> list[bool | Redirect]:
        """Store what the server lacks; True for each it holds now."""
        parts: list[list[Blob]] = []
        owners: list[int] = []
        wholes: list[list[Blob]] = []
        for index, write in enumerate(writes):
            value = write.blob
            if is_split(value, MAX_VALUE_BYTES):
                manifest, pieces = split(value, find_cuts(value), MAX_VALUE_BYTES)
                value = manifest.pack()
                names = manifest.part_names(write.name)
                parts += [
                    _set(name, piece, write.ttl_ms)
                    for name, piece in zip(names, pieces, strict=True)
                ]
                owners += [index] * len(pieces)
            wholes.append(_set(write.name, value, write.ttl_ms))
        # Published last: a manifest is found only once its parts are there.
        moved = {
            owner: reply
            for owner, reply in zip(owners, self._send(parts), strict=True)
            if isinstance(reply, Redirect)
        }
        replies = self._send(wholes)
        return [
            reply if isinstance(reply, Redirect) else moved.get(index, True)
            for index, reply in enumerate(replies)
        ]

    def contains(self, names: Sequence[bytes]) -> list[bool | Redirect]:
        """Whether each name exists."""
        if self._is_asking:
            return _answers(self._send([[command(b"EXISTS", name)] for name in names]), _is_one)
        # Without a look at each reply where all are plain answers.
        request = b"".join(
            b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b\r\n" % (len(name), name) for name in names
        )

        def read(reader: ReplyReader) -> list[bool] | list[_RawReply]:
            flags = reader.read_flags(len(names))
            if flags is not None:
                return flags
            return [reader.read(self._at_most(0)) for _ in names]

        replies = self._checked(self._connection.exchange([request], read, self._deadline))
        return _answers(replies, _is_one)

    def delete(self, names: Sequence[bytes]) -> list[bool | Redirect]:
        """Whether each name existed; the server frees the memory in its own time."""
        return _answers(self._send([[command(b"UNLINK", name)] for name in names]), _is_one)

    def claim(
        self, names: Sequence[bytes], owner: bytes, duration_ms: int
    ) -> list[bool | Redirect]:
        """Whether the owner has each page's claim now, which ends by itself.

        Args:
            names: of the pages.
            owner: whoever asks.
            duration_ms: life of a new claim.
        """
        commands: list[list[Blob]] = []
        for name in names:
            claim = claim_name(name)
            commands.append([command(b"SET", claim, owner, b"NX", b"PX", b"%d" % duration_ms)])
            commands.append([command(b"GET", claim)])
        replies = self._send(commands, _MAX_WORD_BYTES)
        # A server that drops the claim at once has none to wait for.
        return _answers(replies[1::2], lambda reply: reply is None or reply == owner)

    def evaluate(self, calls: Sequence[Evaluation]) -> list[bytes | Redirect]:
        """What each script returns."""
        commands: list[list[Blob]] = [
            [command(b"EVAL", call.script, b"1", call.name, *call.arguments)] for call in calls
        ]
        return _answers(self._send(commands, _MAX_WORD_BYTES), lambda reply: _word(reply) or b"")

    def note(self, names: Sequence[bytes], value: bytes, duration_ms: int) -> list[bool | Redirect]:
        """Leave one word beside each page's name, in place of what is there; it ends by itself."""
        options = (b"PX", b"%d" % duration_ms)
        commands: list[list[Blob]] = [
            [command(b"SET", name + NOTE_SUFFIX, value, *options)] for name in names
        ]
        return _answers(self._send(commands), lambda _: True)

    def notes(self, names: Sequence[bytes]) -> list[bytes | Redirect | None]:
        """The word beside each page's name; None if there is none."""
        commands: list[list[Blob]] = [[command(b"GET", name + NOTE_SUFFIX)] for name in names]
        return _answers(self._send(commands, _MAX_WORD_BYTES), _word)

    def forget_notes(self, names: Sequence[bytes]) -> list[bool | Redirect]:
        """Whether there was a word beside each name."""
        return self.delete([name + NOTE_SUFFIX for name in names])

    def fetch(self, names: Sequence[bytes], max_bytes: int) -> list[Blob | None]:
        """Each value as it is, from a server that has whole pages; None for whatever else it says.

        Args:
            names: what the server calls them.
            max_bytes: of one value; a server that announces more is not listened to.
        """
        allocate = self._at_most(max_bytes)
        replies = self._fetch(([command(b"GET", name)] for name in names), [allocate] * len(names))
        return [reply if isinstance(reply, bytes | memoryview) else None for reply in replies]

    def _join(self, read: PageRead, value: Blob | int | None) -> Blob | Redirect | None:
        """The blob; if this is its manifest, from its parts, and without one of them a miss."""
        if not isinstance(value, bytes | memoryview):
            return None
        manifest = read_manifest(value)
        if manifest is None:
            return value
        blob = self._buffers.take(manifest.num_bytes)
        places = _places(manifest, blob)
        replies = self._fetch(
            ([_getex(part, read.ttl_ms)] for part in manifest.part_names(read.name)),
            [partial(self._place, place) for place in places],
        )
        if all(reply is place for reply, place in zip(replies, places, strict=True)):
            return blob
        for reply in replies:
            if isinstance(reply, Redirect):
                return reply
        self.delete([read.name])
        return None

    def _place(self, place: memoryview, size: int) -> memoryview:
        return place if size == len(place) else self._buffers.take(size)

    def _at_most(self, max_bytes: int) -> Callable[[int], memoryview]:
        """Takes memory for values; a server that announces a longer one is not listened to."""

        def allocate(size: int) -> memoryview:
            if size > max_bytes:
                raise ProtocolError(f"a value of {size} bytes, where {max_bytes} are the limit")
            return self._buffers.take(size)

        return allocate

    def _send(self, commands: Sequence[Sequence[Blob]], max_bytes: int = 0) -> list[_Reply]:
        """Send commands at once, read all their replies, then check them.

        Args:
            commands: each is answered with one reply.
            max_bytes: of a value among the replies.
        """
        if not commands:
            return []
        request = [*chain.from_iterable(self._requests(commands))]

        def read(reader: ReplyReader) -> list[_RawReply]:
            return [self._read(reader, self._at_most(max_bytes)) for _ in commands]

        return self._checked(self._connection.exchange(request, read, self._deadline))

    def _fetch(
        self,
        commands: Iterable[Sequence[Blob]],
        places: Sequence[Callable[[int], memoryview]] | None = None,
    ) -> list[_Reply]:
        """As ``_send``, for long values: little more is asked for than what is on its way.

        That is a few per cent faster than asking for a whole batch at once, and a server that
        copies its replies, as Valkey before 9 does, never holds a batch twice.

        Args:
            commands: each is answered with one value.
            places: where each goes; fresh memory if None.
        """
        requests = self._requests(commands)
        num_sent = 0

        def take(until: int) -> list[Blob]:
            nonlocal num_sent
            taken = [*islice(requests, max(0, until - num_sent))]
            num_sent += len(taken)
            return [*chain.from_iterable(taken)]

        def read(reader: ReplyReader) -> list[_RawReply]:
            replies: list[_RawReply] = []

            def allocate(size: int) -> memoryview:
                num_read = len(replies)
                self._connection.send_more(take(num_read + 1 + max(1, _BYTES_AHEAD // (size or 1))))
                return (places[num_read] if places else self._buffers.take)(size)

            while len(replies) < num_sent:
                reply = self._read(reader, allocate)
                replies.append(reply)
                if not isinstance(reply, memoryview):  # the next are likely missing too
                    self._connection.send_more(take(2 * len(replies)))
            return replies

        first = take(1)
        if not first:
            return []
        return self._checked(self._connection.exchange(first, read, self._deadline))

    def _requests(self, commands: Iterable[Sequence[Blob]]) -> Iterator[Sequence[Blob]]:
        return ((_ASKING, *parts) if self._is_asking else parts for parts in commands)

    def _read(self, reader: ReplyReader, allocate: Callable[[int], memoryview]) -> _RawReply:
        if self._is_asking:
            reader.read(self._at_most(0))
        return reader.read(allocate)

    def _checked(self, replies: Sequence[_RawReply]) -> list[_Reply]:
        """The replies.

        Raises:
            TierRefusedError: one of them is an error (out of memory, loading).
        """
        good: list[_Reply] = []
        for reply in replies:
            if not isinstance(reply, ErrorReply):
                good.append(reply)
            elif (redirect := _redirect(reply.message)) is not None:
                good.append(redirect)
            else:
                if reply.message.startswith(_WRONG_SERVER):
                    self._connection.close()
                raise TierRefusedError(reply.message)
        return good


_RawReply = Blob | int | ErrorReply | None
_Reply = Blob | int | Redirect | None


def _getex(name: bytes, ttl_ms: int) -> bytes:
    return command(b"GETEX", name, b"PX", b"%d" % ttl_ms)


def _set(name: bytes, value: Blob, ttl_ms: int) -> list[Blob]:
    options = (b"NX", b"PX", b"%d" % ttl_ms)
    return command_with_payload(b"SET", name, payload=value, options=options)


def _answers(
    replies: Iterable[_Reply], meaning: Callable[[Blob | int | None], T]
) -> list[T | Redirect]:
    """What each reply means; a redirect stands for itself."""
    return [reply if isinstance(reply, Redirect) else meaning(reply) for reply in replies]


def _is_one(reply: Blob | int | None) -> bool:
    return reply == 1


def _word(reply: Blob | int | None) -> bytes | None:
    return bytes(reply) if isinstance(reply, bytes | memoryview) else None


def _places(manifest: Manifest, blob: memoryview) -> list[memoryview]:
    """Where each part goes; the head is written."""
    start = len(manifest.head)
    blob[:start] = manifest.head
    places: list[memoryview] = []
    for length in manifest.lengths:
        places.append(blob[start : start + length])
        start += length
    return places


def _redirect(message: str) -> Redirect | None:
    kind, _, rest = message.partition(" ")
    if kind not in ("MOVED", "ASK"):
        return None
    try:
        error = (MovedError if kind == "MOVED" else AskError)(rest)
    except (ValueError, IndexError):
        return None
    return Redirect(error.slot_id, error.host, error.port, kind == "ASK")
