"""What one connection is asked: pages by name, and the words beside them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from kv_store.tiers.parts import Manifest, is_split, read_manifest, split
from kv_store.tiers.resp import command, command_with_payload
from kv_store.tiers.valkey_pipeline import Redirect, answers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kv_store.tiers.base import Blob
    from kv_store.tiers.valkey_pipeline import Pipeline, Reply

MAX_VALUE_BYTES = 2 << 20
_MAX_WORD_BYTES = 64 << 10  # of a claim, a note, or what a script returns
CLAIM_SUFFIX = b":claim"
NOTE_SUFFIX = b":at"


def claim_name(name: bytes) -> bytes:
    """Where a page's claim lies; in a cluster, beside it."""
    return name + CLAIM_SUFFIX


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

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def get(self, reads: Sequence[PageRead]) -> list[Blob | Redirect | None]:
        """Each blob, or None for a miss."""
        values = self._pipeline.fetch([_getex(read.name, read.ttl_ms)] for read in reads)
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
            for owner, reply in zip(owners, self._pipeline.send(parts), strict=True)
            if isinstance(reply, Redirect)
        }
        replies = self._pipeline.send(wholes)
        return [
            reply if isinstance(reply, Redirect) else moved.get(index, True)
            for index, reply in enumerate(replies)
        ]

    def contains(self, names: Sequence[bytes]) -> list[bool | Redirect]:
        """Whether each name exists."""
        commands = [b"*2\r\n$6\r\nEXISTS\r\n$%d\r\n%b\r\n" % (len(name), name) for name in names]
        return answers(self._pipeline.send_for_flags(commands), _is_one)

    def delete(self, names: Sequence[bytes]) -> list[bool | Redirect]:
        """Whether each page existed; its parts go with it.

        Their names are in its manifest, so it is read first. Parts whose manifest has left are not
        found any more, and end by themselves.
        """
        values = self._pipeline.fetch([command(b"GETEX", name)] for name in names)
        parts = [
            part
            for name, value in zip(names, values, strict=True)
            if isinstance(value, bytes | memoryview) and (manifest := read_manifest(value))
            for part in manifest.part_names(name)
        ]
        return self._unlink([*names, *parts])[: len(names)]

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
        replies = self._pipeline.send(commands, _MAX_WORD_BYTES)
        # A server that drops the claim at once has none to wait for.
        return answers(replies[1::2], lambda reply: reply is None or reply == owner)

    def evaluate(self, calls: Sequence[Evaluation]) -> list[bytes | Redirect]:
        """What each script returns."""
        commands: list[list[Blob]] = [
            [command(b"EVAL", call.script, b"1", call.name, *call.arguments)] for call in calls
        ]
        return answers(
            self._pipeline.send(commands, _MAX_WORD_BYTES), lambda reply: _word(reply) or b""
        )

    def note(self, names: Sequence[bytes], value: bytes, duration_ms: int) -> list[bool | Redirect]:
        """Leave one word beside each page's name, in place of what is there; it ends by itself."""
        options = (b"PX", b"%d" % duration_ms)
        commands: list[list[Blob]] = [
            [command(b"SET", name + NOTE_SUFFIX, value, *options)] for name in names
        ]
        return answers(self._pipeline.send(commands), lambda _: True)

    def notes(self, names: Sequence[bytes]) -> list[bytes | Redirect | None]:
        """The word beside each page's name; None if there is none."""
        commands: list[list[Blob]] = [[command(b"GET", name + NOTE_SUFFIX)] for name in names]
        return answers(self._pipeline.send(commands, _MAX_WORD_BYTES), _word)

    def forget_notes(self, names: Sequence[bytes]) -> list[bool | Redirect]:
        """Whether there was a word beside each name."""
        return self._unlink([name + NOTE_SUFFIX for name in names])

    def fetch(self, names: Sequence[bytes], max_bytes: int) -> list[Blob | None]:
        """Each value as it is, from a server that has whole pages; None for whatever else it says.

        Args:
            names: what the server calls them.
            max_bytes: of one value; a server that announces more is not listened to.
        """
        allocate = self._pipeline.at_most(max_bytes)
        replies = self._pipeline.fetch(
            ([command(b"GET", name)] for name in names), [allocate] * len(names)
        )
        return [reply if isinstance(reply, bytes | memoryview) else None for reply in replies]

    def _join(self, read: PageRead, value: Reply) -> Blob | Redirect | None:
        """The blob; if this is its manifest, from its parts, and without one of them a miss."""
        if not isinstance(value, bytes | memoryview):
            return None
        manifest = read_manifest(value)
        if manifest is None:
            return value
        blob = self._pipeline.buffers.take(manifest.num_bytes)
        places = _places(manifest, blob)
        replies = self._pipeline.fetch(
            ([_getex(part, read.ttl_ms)] for part in manifest.part_names(read.name)),
            [partial(self._place, place) for place in places],
        )
        if all(reply is place for reply, place in zip(replies, places, strict=True)):
            return blob
        for reply in replies:
            if isinstance(reply, Redirect):
                return reply
        self._unlink([read.name, *manifest.part_names(read.name)])
        return None

    def _unlink(self, names: Sequence[bytes]) -> list[bool | Redirect]:
        """Whether each name existed; the server frees the memory in its own time."""
        return answers(self._pipeline.send([[command(b"UNLINK", name)] for name in names]), _is_one)

    def _place(self, place: memoryview, size: int) -> memoryview:
        return place if size == len(place) else self._pipeline.buffers.take(size)


def _getex(name: bytes, ttl_ms: int) -> bytes:
    return command(b"GETEX", name, b"PX", b"%d" % ttl_ms)


def _set(name: bytes, value: Blob, ttl_ms: int) -> list[Blob]:
    options = (b"NX", b"PX", b"%d" % ttl_ms)
    return command_with_payload(b"SET", name, payload=value, options=options)


def _is_one(reply: Reply) -> bool:
    return reply == 1


def _word(reply: Reply) -> bytes | None:
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
