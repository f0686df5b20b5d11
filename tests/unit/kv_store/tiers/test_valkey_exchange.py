"""How many values are asked for ahead of the one that arrives."""

import contextlib
import socket
import threading
import time

from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.valkey_connection import ValkeyConnection
from kv_store.tiers.valkey_exchange import Exchange
from tests.unit.kv_store.tiers.test_valkey_connection import PATIENT_S, FakeRedisConnection

MAX_BYTES = 4 << 20


class Server:
    """Answers GETs by number, and counts those it was sent when each answer begins."""

    def __init__(self, values):
        self._values = values
        self.peers = []
        self.num_asked = []
        self._thread = threading.Thread(target=self._serve)

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
        peer, received = self.peers[0], b""
        for number, value in enumerate(self._values):
            while received.count(b"GET") <= number:
                if not (data := peer.recv(1 << 16)):
                    return
                received += data
            self.num_asked.append(received.count(b"GET"))
            if value is None:
                peer.sendall(b"$-1\r\n")
                continue
            peer.sendall(b"$%d\r\n" % len(value))
            # Whoever asks for more at the header does it before the value ends.
            time.sleep(0.02)
            peer.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                received += peer.recv(1 << 16)
            peer.setblocking(True)
            peer.sendall(value + b"\r\n")


def fetch(values):
    with Server(values) as server:
        connection = ValkeyConnection(lambda: FakeRedisConnection(server.peers))
        exchange = Exchange(connection, BufferPool(), time.monotonic() + PATIENT_S)
        got = exchange.fetch([b"page%d" % number for number in range(len(values))], MAX_BYTES)
        connection.close()
    assert [value and bytes(value) for value in got] == values
    return server.num_asked


def test_one_long_value_is_asked_for_while_another_arrives():
    values = [bytes([number]) * (2 << 20) for number in range(4)]
    assert fetch(values) == [1, 2, 3, 4]


def test_short_values_are_asked_for_together_once_one_is_known():
    assert fetch([b"x" * 1000] * 40) == [1, *[40] * 39]


def test_values_of_some_hundred_kilobytes_are_asked_for_by_their_bytes():
    assert fetch([bytes(400 << 10)] * 5) == [1, 3, 4, 5, 5]


def test_where_values_are_missing_ever_more_are_asked_for():
    num_asked = fetch([None] * 64 + [b"at last" * 100_000])
    assert all(asked <= max(1, 2 * number) for number, asked in enumerate(num_asked))
    assert len(set(num_asked)) < 32


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
    exchange = Exchange(
        ValkeyConnection(lambda: Once([])), BufferPool(), time.monotonic() + PATIENT_S
    )
    assert exchange.fetch([b"page"], MAX_BYTES) == [value]
    thread.join()
    theirs.close()
    ours.close()
