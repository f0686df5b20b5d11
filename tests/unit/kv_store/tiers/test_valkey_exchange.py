"""How many values are asked for ahead of the one that arrives, and what is no answer at all."""

import socket
import threading
import time
from functools import partial

import pytest

from kv_store import TierUnavailableError
from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.valkey_connection import ValkeyConnection
from kv_store.tiers.valkey_exchange import Exchange
from kv_store.tiers.valkey_pipeline import Pipeline
from tests.unit.kv_store.tiers.test_valkey_connection import (
    PATIENT_S,
    FakeRedisConnection,
    answering,
)

MAX_BYTES = 4 << 20


class Server:
    """Answers GETs in turn; after an answer's first line it waits for as many as must have come."""

    def __init__(self, values, asked_by_answer):
        self._values = values
        self._asked_by_answer = asked_by_answer
        self._received = b""
        self._thread = threading.Thread(target=self._serve)
        self.peers = []
        self.num_asked = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        for peer in self.peers:
            peer.close()
        self._thread.join()

    def _serve(self):
        wait = time.monotonic() + PATIENT_S
        while not self.peers and time.monotonic() < wait:
            time.sleep(0.001)
        for number, value in enumerate(self._values):
            self._wait_for(number + 1)
            self.peers[0].sendall(b"$%d\r\n" % (-1 if value is None else len(value)))
            self._wait_for(self._asked_by_answer[number])
            self.num_asked.append(self._received.count(b"GET"))
            if value is not None:
                self.peers[0].sendall(value + b"\r\n")

    def _wait_for(self, num_asked):
        while self._received.count(b"GET") < num_asked:
            data = self.peers[0].recv(1 << 16)
            if not data:
                raise ConnectionError(f"{num_asked} requests never came")
            self._received += data


def fetch(values, asked_by_answer):
    with Server(values, asked_by_answer) as server:
        connection = ValkeyConnection(lambda: FakeRedisConnection(server.peers))
        exchange = Exchange(Pipeline(connection, BufferPool(), time.monotonic() + PATIENT_S))
        got = exchange.fetch([b"page%d" % number for number in range(len(values))], MAX_BYTES)
        connection.close()
    assert [value and bytes(value) for value in got] == values
    return server.num_asked


@pytest.mark.parametrize(
    ("num_bytes", "asked_by_answer"),
    [
        (2 << 20, [2, 3, 4, 4]),  # another one while one arrives
        (400 << 10, [3, 4, 5, 5, 5]),  # a mebibyte
        (1000, [40] * 40),  # all, once one is known
    ],
)
def test_values_are_asked_for_by_their_bytes_before_those_that_arrive_end(
    num_bytes, asked_by_answer
):
    values = [bytes([number]) * num_bytes for number in range(len(asked_by_answer))]
    assert fetch(values, asked_by_answer) == asked_by_answer


@pytest.mark.parametrize("num_missing", [1, 2, 64])
def test_where_values_are_missing_ever_more_are_asked_for(num_missing):
    values = [None] * num_missing + [b"at last" * 100_000]
    asked_by_answer = [min(2 * (number + 1), len(values)) for number in range(len(values))]
    assert fetch(values, asked_by_answer) == asked_by_answer


def test_a_long_value_is_whole_however_it_is_cut_on_the_way():
    # Over TCP, where a reader can be left asleep until more has come.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    value = bytes(range(256)) * (3 << 12)

    class Once(FakeRedisConnection):
        def connect(self):
            self._sock = ours

    def serve():
        theirs.recv(1 << 10)
        theirs.sendall(b"$%d\r\n" % len(value))
        for start, end in ((0, 1), (1, 700_000), (700_000, len(value) - 1)):
            theirs.sendall(value[start:end])
            time.sleep(0.01)
        theirs.sendall(value[-1:] + b"\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    connection = ValkeyConnection(lambda: Once([]))
    exchange = Exchange(Pipeline(connection, BufferPool(), time.monotonic() + PATIENT_S))
    assert exchange.fetch([b"page"], MAX_BYTES) == [value]
    thread.join()
    theirs.close()
    ours.close()


class NoMemory(BufferPool):
    def take(self, num_bytes):
        raise AssertionError(f"{num_bytes} bytes for what nobody asked for")


def ask(operation, answer, *, is_asking=False, buffers=None):
    peers = []
    thread = answering(peers, answer)
    connection = ValkeyConnection(lambda: FakeRedisConnection(peers))
    try:
        return operation(
            Exchange(
                Pipeline(
                    connection,
                    buffers or NoMemory(),
                    time.monotonic() + PATIENT_S,
                    is_asking=is_asking,
                )
            )
        )
    finally:
        connection.close()
        thread.join()
        for peer in peers:
            peer.close()


@pytest.mark.parametrize("is_asking", [False, True])
@pytest.mark.parametrize("value", [b"$1\r\n1\r\n", b"$536870912\r\n"], ids=["short", "long"])
def test_a_value_is_no_answer_to_a_question_without_one(is_asking, value):
    answer = b"+OK\r\n" * is_asking + value
    for operation in (Exchange.contains, Exchange.forget_notes):
        with pytest.raises(TierUnavailableError, match="ProtocolError"):
            ask(partial(operation, names=[b"page"]), answer, is_asking=is_asking)


def test_only_a_one_says_that_a_page_is_held():
    def ask_for_four(exchange):
        return exchange.contains([b"a", b"b", b"c", b"d"])

    assert ask(ask_for_four, b"+OK\r\n$-1\r\n:1\r\n:0\r\n") == [False, False, True, False]


def test_notes_and_claims_are_words():
    long = b"$100000\r\n" + bytes(100_000) + b"\r\n"
    for operation, answer in (
        (lambda exchange: exchange.notes([b"page"]), long),
        (lambda exchange: exchange.claim([b"page"], b"me", 1000), b"+OK\r\n" + long),
    ):
        with pytest.raises(TierUnavailableError, match="100000 bytes"):
            ask(operation, answer)
    noted = ask(lambda exchange: exchange.notes([b"a"]), b"$2\r\nhi\r\n", buffers=BufferPool())
    assert noted == [b"hi"]
