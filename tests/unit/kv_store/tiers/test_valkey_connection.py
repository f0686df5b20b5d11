import socket
import ssl
import threading
import time
from contextlib import suppress

import pytest

from kv_store import TierUnavailableError
from kv_store.errors import TierBusyError
from kv_store.tiers.resp import command
from kv_store.tiers.valkey_connection import ValkeyConnection
from tests.certificates import Authority

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


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    """TLS as a client and as a server sees it."""
    folder = tmp_path_factory.mktemp("certificates")
    Authority().write(folder, ["valkey"])
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return ssl.create_default_context(cafile=folder / "ca.crt"), theirs


class TlsServer:
    """Lets clients in, each by one handshake; a test then holds the ends."""

    def __init__(self, contexts):
        self._ours, self._theirs = contexts
        self.ends = []

    def connect(self):
        """For the client: a socket behind the handshake, whose tickets nobody has read."""
        near, far = socket.socketpair()
        accepting = threading.Thread(
            target=lambda: self.ends.append(self._theirs.wrap_socket(far, server_side=True))
        )
        accepting.start()
        wrapped = self._ours.wrap_socket(near, server_hostname="valkey")
        accepting.join()
        self.ends[-1].settimeout(PATIENT_S)
        return wrapped

    def answer(self, number, data):
        self.ends[number].recv(1 << 16)
        self.ends[number].sendall(data)


@pytest.fixture
def tls(contexts):
    server = TlsServer(contexts)
    yield server
    for end in server.ends:
        end.close()


class FakeTlsConnection(FakeRedisConnection):
    def connect(self):
        self._sock = self._peers.connect()


@pytest.fixture
def tls_connection(tls):
    connection = ValkeyConnection(lambda: FakeTlsConnection(tls))
    yield connection
    connection.close()


def ask_tls(connection, tls, number, answer):
    """One exchange on the connection of that number."""

    def serve():
        wait_for(tls.ends, number + 1)
        tls.answer(number, answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        return ask(connection)
    finally:
        thread.join()


def test_tickets_do_not_end_a_tls_connection(tls_connection, tls):
    stream = tls_connection._connected()
    assert tls_connection._connected() is stream
    for answer in (b"one", b"two"):
        assert ask_tls(tls_connection, tls, 0, b"+%b\r\n" % answer) == [answer]
    assert len(tls.ends) == 1


def say_good_bye(end):
    end.settimeout(0)
    with suppress(ssl.SSLWantReadError):  # whoever is told does not answer yet
        end.unwrap()


@pytest.mark.parametrize(
    "end",
    [lambda end: end.close(), say_good_bye, lambda end: end.sendall(b"+STALE\r\n")],
    ids=["hung up", "said good-bye", "said what nobody asked"],
)
def test_a_tls_connection_that_is_of_no_use_any_more_is_replaced(tls_connection, tls, end):
    assert ask_tls(tls_connection, tls, 0, b"+ONE\r\n") == [b"ONE"]
    end(tls.ends[0])
    assert ask_tls(tls_connection, tls, 1, b"+TWO\r\n") == [b"TWO"]
