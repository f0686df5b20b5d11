import socket
import threading
import time

import pytest

from kv_store import TierUnavailableError
from kv_store.errors import TierBusyError
from kv_store.tiers.resp import command
from kv_store.tiers.valkey_connection import ValkeyConnection

PATIENT_S = 10.0
PING = (command(b"PING"),)


class FakeRedisConnection:
    """What redis-py would open: one end of a socket pair; a test holds the other."""

    def __init__(self, peers):
        self._sock = None
        self._peers = peers

    def connect(self):
        self._sock, peer = socket.socketpair()
        peer.settimeout(PATIENT_S)
        self._peers.append(peer)

    def disconnect(self):
        self._sock.close()


@pytest.fixture
def peers():
    peers = []
    yield peers
    for peer in peers:
        peer.close()


@pytest.fixture
def connection(peers):
    connection = ValkeyConnection(lambda: FakeRedisConnection(peers))
    yield connection
    connection.close()


def allocate(size):
    return memoryview(bytearray(size))


def ask(connection, patience_s=PATIENT_S, request=PING, count=1):
    return connection.exchange(
        request,
        lambda reader: [reader.read(allocate) for _ in range(count)],
        time.monotonic() + patience_s,
    )


def answering(peers, *steps):
    """A server that sends each step once the one before has been asked for."""

    def serve():
        wait = time.monotonic() + PATIENT_S
        while not peers and time.monotonic() < wait:
            time.sleep(0.001)
        for step in steps:
            peers[0].recv(1 << 16)
            peers[0].sendall(step)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_one_connection_serves_many_exchanges(connection, peers):
    thread = answering(peers, b"+PONG\r\n", b"$3\r\nabc\r\n:5\r\n")
    assert ask(connection) == [b"PONG"]
    assert ask(connection, count=2) == [b"abc", 5]
    thread.join()
    assert len(peers) == 1


def test_many_and_long_buffers_arrive_in_order(connection, peers):
    buffers = [bytes([number % 251]) * (number % 7) for number in range(3000)]
    buffers.append(bytes(range(256)) * 20_000)
    wanted = b"".join(buffers)
    got = bytearray()

    def serve():
        while len(got) < len(wanted):
            got.extend(peers[0].recv(1 << 20))
        peers[0].sendall(b"+OK\r\n")

    connection._connected()
    thread = threading.Thread(target=serve)
    thread.start()
    assert ask(connection, request=buffers) == [b"OK"]
    thread.join()
    assert got == wanted


@pytest.mark.parametrize(
    "answer",
    [b"", b"$100000\r\nabc", b"+PO", b"$3\r\nab"],
    ids=["silence", "half a page", "half a line", "half a short value"],
)
def test_a_server_that_stops_is_given_up_and_its_connection_with_it(connection, peers, answer):
    thread = answering(peers, answer)
    start = time.monotonic()
    with pytest.raises(TierUnavailableError, match="in time"):
        ask(connection, patience_s=0.05)
    assert time.monotonic() - start >= 0.05
    thread.join()
    # The rest of the late answer must not be taken for the next one's.
    second = threading.Thread(target=lambda: (wait_for(peers, 2), peers[1].sendall(b"+NEW\r\n")))
    second.start()
    assert ask(connection) == [b"NEW"]
    second.join()


def wait_for(peers, count):
    deadline = time.monotonic() + PATIENT_S
    while len(peers) < count and time.monotonic() < deadline:
        time.sleep(0.001)


def test_a_server_that_trickles_does_not_outlast_the_deadline(connection, peers):
    is_over = threading.Event()

    def serve():
        wait_for(peers, 1)
        peers[0].sendall(b"$1000000\r\n")
        while not is_over.wait(0.01):
            try:
                peers[0].sendall(b"x")
            except OSError:
                return

    thread = threading.Thread(target=serve)
    thread.start()
    with pytest.raises(TierUnavailableError, match="in time"):
        ask(connection, patience_s=0.2)
    is_over.set()
    thread.join()


@pytest.mark.parametrize("answer", [b"?\r\n", b"+PONG\r\n+PONG\r\n"])
def test_nonsense_closes_the_connection(connection, peers, answer):
    thread = answering(peers, answer)
    with pytest.raises(TierUnavailableError, match="ProtocolError"):
        ask(connection)
    thread.join()
    assert connection._stream is None


def test_a_connection_that_was_closed_while_idle_is_replaced(connection, peers):
    thread = answering(peers, b"+PONG\r\n")
    ask(connection)
    thread.join()
    peers[0].close()
    second = threading.Thread(target=lambda: (wait_for(peers, 2), peers[1].sendall(b"+NEW\r\n")))
    second.start()
    assert ask(connection) == [b"NEW"]
    second.join()


def test_bytes_nobody_asked_for_end_the_connection(connection, peers):
    thread = answering(peers, b"+PONG\r\n")
    ask(connection)
    thread.join()
    peers[0].sendall(b"+STALE\r\n")
    second = threading.Thread(target=lambda: (wait_for(peers, 2), peers[1].sendall(b"+NEW\r\n")))
    second.start()
    assert ask(connection) == [b"NEW"]
    second.join()


def test_an_abort_wakes_a_waiting_thread(connection, peers):
    failed = []

    def wait():
        try:
            ask(connection)
        except TierUnavailableError as exc:
            failed.append(exc)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(peers, 1)
    peers[0].recv(100)
    connection.abort()
    thread.join(PATIENT_S)
    assert failed


def test_no_time_left_is_no_connection(connection, peers):
    with pytest.raises(TierBusyError):
        ask(connection, patience_s=-1)
    assert not peers


def test_a_connection_outlives_those_who_come_too_late_to_use_it(connection, peers):
    thread = answering(peers, b"+PONG\r\n", b"+AGAIN\r\n")
    assert ask(connection) == [b"PONG"]
    with pytest.raises(TierBusyError):
        ask(connection, patience_s=-1)
    assert ask(connection) == [b"AGAIN"]
    thread.join()
    assert len(peers) == 1
