"""Commands over one connection: pipelined under one deadline, and their replies checked.

A reply may be a ``Redirect`` in place of a result: in a cluster, a slot can move to another node at
any moment. Whoever asked then asks there.
"""

from __future__ import annotations

from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from redis.exceptions import AskError, MovedError

from kv_store.errors import TierRefusedError
from kv_store.tiers.base import Blob
from kv_store.tiers.resp import ErrorReply, ProtocolError, ReplyReader, command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kv_store.tiers.buffers import BufferPool
    from kv_store.tiers.valkey_connection import ValkeyConnection

Reply = Blob | int | None
_RawReply = Reply | ErrorReply
T = TypeVar("T")

# Of values asked for beyond the one that arrives: a round trip's worth on a fast network.
_BYTES_AHEAD = 1 << 20
_ASKING = command(b"ASKING")
# What a server answers that is no longer the one to ask; whoever connects anew finds the right one.
_WRONG_SERVER = ("READONLY", "MASTERDOWN", "LOADING")


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


class Pipeline:
    """For one operation, in one thread.

    Attributes:
        buffers: where values are read to.
    """

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
            buffers: where values are read to.
            deadline: on the monotonic clock.
            is_asking: the commands follow redirects of a slot that is being moved.
        """
        self._connection = connection
        self.buffers = buffers
        self._deadline = deadline
        self._is_asking = is_asking

    def at_most(self, max_bytes: int) -> Callable[[int], memoryview]:
        """Takes memory for values; a server that announces a longer one is not listened to.

        Args:
            max_bytes: of one value.
        """

        def allocate(size: int) -> memoryview:
            if size > max_bytes:
                raise ProtocolError(f"a value of {size} bytes, where {max_bytes} are the limit")
            return self.buffers.take(size)

        return allocate

    def send(
        self, commands: Sequence[Sequence[Blob]], max_bytes: int = 0
    ) -> list[Reply | Redirect]:
        """Send commands at once, read all their replies, then check them.

        Args:
            commands: each is answered with one reply.
            max_bytes: of a value among the replies.

        Raises:
            TierRefusedError: one of the replies is an error.
        """
        if not commands:
            return []
        request = [*chain.from_iterable(self._requests(commands))]
        allocate = self.at_most(max_bytes)

        def read(reader: ReplyReader) -> list[_RawReply]:
            return [self._read(reader, allocate) for _ in commands]

        return self._checked(self._connection.exchange(request, read, self._deadline))

    def send_for_flags(self, commands: Sequence[bytes]) -> list[Reply | Redirect]:
        """As ``send``, without a look at each reply where all are 0 or 1."""
        if self._is_asking:
            return self.send([[one] for one in commands])

        def read(reader: ReplyReader) -> list[bool] | list[_RawReply]:
            flags = reader.read_flags(len(commands))
            if flags is not None:
                return flags
            return [self._read(reader, self.at_most(0)) for _ in commands]

        request = [b"".join(commands)]
        return self._checked(self._connection.exchange(request, read, self._deadline))

    def fetch(
        self,
        commands: Iterable[Sequence[Blob]],
        places: Sequence[Callable[[int], memoryview]] | None = None,
    ) -> list[Reply | Redirect]:
        """As ``send``, for long values: little more is asked for than what is on its way.

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
                return (places[num_read] if places else self.buffers.take)(size)

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
            reader.read(self.at_most(0))
        return reader.read(allocate)

    def _checked(self, replies: Sequence[_RawReply]) -> list[Reply | Redirect]:
        """The replies.

        Raises:
            TierRefusedError: one of them is an error (out of memory, loading).
        """
        good: list[Reply | Redirect] = []
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


def answers(
    replies: Iterable[Reply | Redirect], meaning: Callable[[Reply], T]
) -> list[T | Redirect]:
    """What each reply means; a redirect stands for itself."""
    return [reply if isinstance(reply, Redirect) else meaning(reply) for reply in replies]


def _redirect(message: str) -> Redirect | None:
    kind, _, rest = message.partition(" ")
    if kind not in ("MOVED", "ASK"):
        return None
    try:
        error = (MovedError if kind == "MOVED" else AskError)(rest)
    except (ValueError, IndexError):
        return None
    return Redirect(error.slot_id, error.host, error.port, kind == "ASK")
