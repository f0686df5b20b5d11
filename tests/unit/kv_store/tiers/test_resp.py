import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_store.tiers.resp import (
    ErrorReply,
    ProtocolError,
    ReplyReader,
    command,
    command_with_payload,
)


class Chunks:
    """A stream that arrives in pieces of given sizes, over and over."""

    def __init__(self, data, sizes=(1 << 30,)):
        self._data = memoryview(bytes(data))
        self._sizes = sizes
        self._turn = 0

    def receive_some(self, target):
        if not self._data:
            raise ConnectionResetError
        size = min(len(target), len(self._data), self._sizes[self._turn % len(self._sizes)])
        self._turn += 1
        target[:size] = self._data[:size]
        self._data = self._data[size:]
        return size

    def receive_all(self, target):
        while target:
            target = target[self.receive_some(target) :]


def allocate(size):
    return memoryview(bytearray(size))


def frame(reply):
    match reply:
        case None:
            return b"$-1\r\n"
        case bool() | int():
            return b":%d\r\n" % reply
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case ErrorReply(message):
            return b"-" + message.encode() + b"\r\n"
    raise TypeError(reply)


REPLIES = st.lists(
    st.one_of(
        st.none(),
        st.integers(-(2**63), 2**63 - 1),
        st.binary(max_size=60_000),
        st.sampled_from([ErrorReply("OOM command not allowed"), ErrorReply("")]),
    ),
    max_size=8,
)
SIZES = st.lists(st.integers(1, 40_000), min_size=1, max_size=6)


@given(REPLIES, SIZES)
def test_replies_come_back_however_they_are_cut(replies, sizes):
    reader = ReplyReader(Chunks(b"".join(map(frame, replies)), sizes))
    assert [reader.read(allocate) for _ in replies] == replies
    assert reader.is_drained


@given(st.lists(st.booleans(), max_size=300), SIZES)
def test_flags_are_read_at_once(flags, sizes):
    reader = ReplyReader(Chunks(b"".join(map(frame, flags)) + b":7\r\n", sizes))
    assert reader.read_flags(len(flags)) == flags
    assert reader.read(allocate) == 7


@given(
    st.lists(
        st.one_of(st.integers(0, 12), st.just(ErrorReply("LOADING"))), min_size=1, max_size=60
    ).filter(lambda replies: any(reply not in (0, 1) for reply in replies)),
    SIZES,
)
def test_what_is_not_all_flags_can_still_be_read_one_by_one(replies, sizes):
    reader = ReplyReader(Chunks(b"".join(map(frame, replies)), sizes))
    assert reader.read_flags(len(replies)) is None
    assert [reader.read(allocate) for _ in replies] == replies


def test_a_bulk_string_lands_where_the_caller_says():
    place = memoryview(bytearray(100_000))
    reader = ReplyReader(Chunks(frame(b"x" * 100_000), (70_000, 3)))
    assert reader.read(lambda _: place) is place
    assert bytes(place) == b"x" * 100_000


def test_a_status_is_its_text():
    assert ReplyReader(Chunks(b"+OK\r\n")).read(allocate) == b"OK"


@pytest.mark.parametrize(
    "data",
    [
        b"*1\r\n:1\r\n",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"$x\r\n",
        b"$-2\r\n",
        b"$999999999999\r\n",
        b":\r\n",
        b":1\n",
        b"$3\r\nabcde\r\n",
        b"+" + b"x" * 70_000 + b"\r\n",
    ],
)
def test_what_is_no_reply_is_refused(data):
    with pytest.raises(ProtocolError):
        ReplyReader(Chunks(data)).read(allocate)


@given(st.binary(max_size=200), SIZES)
def test_any_bytes_are_a_reply_or_an_error(data, sizes):
    reader = ReplyReader(Chunks(data, sizes))
    try:
        for _ in range(3):
            reply = reader.read(allocate)
            assert reply is None or isinstance(reply, bytes | int | memoryview | ErrorReply)
    except (ProtocolError, ConnectionResetError):
        return


def test_requests_are_arrays_of_bulk_strings():
    assert command(b"UNLINK", b"a") == b"*2\r\n$6\r\nUNLINK\r\n$1\r\na\r\n"
    payload = memoryview(b"\r\n$")
    parts = command_with_payload(b"SET", b"k", payload=payload, options=(b"NX", b"PX", b"10"))
    assert parts[1] is payload
    assert b"".join(parts) == command(b"SET", b"k", b"\r\n$", b"NX", b"PX", b"10")
