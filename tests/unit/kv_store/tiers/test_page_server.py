"""A real page server on loopback, and its readers."""

import socket
import threading
import time

import pytest
from pydantic import ValidationError

from kv_store import PeersTierConfig, TierUnavailableError
from kv_store.tiers import page_server
from kv_store.tiers.breaker import CircuitBreaker
from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.page_directory import ServerAddress, own_address, read_record
from kv_store.tiers.page_server import PageServer
from kv_store.tiers.page_session import PageSession, served_name
from kv_store.tiers.peer import Peer
from kv_store.tiers.resp import command
from kv_store.tiers.valkey_topology import ValkeyAddress
from tests.kv_pages import make_chain, make_layout, wait_until

KEYS = make_chain(make_layout(), 4)
TOKEN = "0123456789abcdef0123456789abcdef"
LARGE = bytes(range(256)) * 12_000
PATIENT_S = 60.0


class Pages(dict):
    """A source that can be told to fail."""

    error = None

    def contains(self, key):
        return key in self

    def read(self, key):
        if self.error:
            raise self.error
        return self.get(key)


@pytest.fixture
def pages():
    return Pages({KEYS[0]: b"zero", KEYS[1]: LARGE, KEYS[2]: b""})


@pytest.fixture
def start(pages):
    servers = []

    def start(max_clients=8):
        server = PageServer(pages, token=TOKEN.encode(), max_clients=max_clients, max_reads=2)
        servers.append(server)
        return server, server.start("127.0.0.1")

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def reader():
    peers = []

    def reader(port, token=TOKEN, max_page_bytes=1 << 23, clock=lambda: 0.0):
        peer = Peer(
            ServerAddress("127.0.0.1", port, token),
            connect_timeout_s=PATIENT_S,
            max_connections=2,
            max_page_bytes=max_page_bytes,
            buffers=BufferPool(),
            breaker=CircuitBreaker(max_failures=1000, open_s=1, max_open_s=1),
            clock=clock,
        )
        peers.append(peer)
        return peer

    yield reader
    for peer in peers:
        peer.close()


def deadline():
    return time.monotonic() + PATIENT_S


async def test_a_reader_gets_what_is_held(start, reader):
    server, port = start()
    peer = reader(port)
    assert await peer.contains(KEYS, deadline()) == [True, True, True, False]
    assert await peer.get(KEYS, deadline()) == [b"zero", LARGE, b"", None]
    wait_until(lambda: server.num_served == 3)


async def test_no_page_without_the_token(start, reader):
    server, port = start()
    peer = reader(port, token="f" * 32)
    assert await peer.contains(KEYS, deadline()) == [False] * 4
    assert await peer.get(KEYS, deadline()) == [None] * 4
    with socket.create_connection(("127.0.0.1", port), PATIENT_S) as stranger:
        stranger.sendall(command(b"GET", served_name(KEYS[0])))
        assert stranger.recv(100) == b""
    assert server.num_served == 0


async def test_a_disk_that_refuses_is_a_miss(start, reader, pages):
    _, port = start()
    pages.error = OSError("no")
    peer = reader(port)
    assert await peer.get(KEYS, deadline()) == [None] * 4
    pages.error = None
    assert (await peer.get(KEYS[:1], deadline())) == [b"zero"]


async def test_a_server_that_has_gone_is_a_miss(start, reader):
    server, port = start()
    peer = reader(port)
    assert (await peer.get(KEYS[:1], deadline())) == [b"zero"]
    server.close()
    assert await peer.get(KEYS, deadline()) == [None] * 4
    assert await peer.contains(KEYS, deadline()) == [False] * 4


async def test_one_client_too_many_is_sent_away(start):
    _, port = start(max_clients=1)
    with socket.create_connection(("127.0.0.1", port), PATIENT_S) as first:
        first.sendall(command(b"AUTH", TOKEN.encode()))
        assert first.recv(5) == b"+OK\r\n"
        with socket.create_connection(("127.0.0.1", port), PATIENT_S) as second:
            assert second.recv(1) == b""
        first.sendall(command(b"PING"))
        assert first.recv(7) == b"+PONG\r\n"


def trickles(client, request):
    """Whether the server listens to a request that comes byte by byte."""
    try:
        for position in range(len(request)):
            client.sendall(request[position : position + 1])
            time.sleep(0.02)
    except OSError:
        return False
    return True


def test_nobody_has_longer_for_a_token_by_sending_it_slowly(start, monkeypatch):
    monkeypatch.setattr(page_server, "_AUTH_S", 0.2)
    _, port = start()
    with socket.create_connection(("127.0.0.1", port), PATIENT_S) as client:
        assert not trickles(client, command(b"AUTH", b"x" * 400))


def test_nobody_has_longer_for_a_command_by_sending_it_slowly(start, monkeypatch):
    monkeypatch.setattr(page_server, "_COMMAND_S", 0.2)
    _, port = start()
    with socket.create_connection(("127.0.0.1", port), PATIENT_S) as client:
        client.sendall(command(b"AUTH", TOKEN.encode()))
        assert client.recv(5) == b"+OK\r\n"
        assert not trickles(client, command(b"GET", b"x" * 400))


async def test_a_client_for_whom_there_is_no_thread_is_sent_away(start, reader, monkeypatch):
    _, port = start()
    start_thread = threading.Thread.start

    def refuse(thread):
        if thread.name == "kv-page-client":
            raise RuntimeError("can't start new thread")
        start_thread(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with socket.create_connection(("127.0.0.1", port), PATIENT_S) as client:
            assert client.recv(1) == b""
    assert await reader(port).get(KEYS[:1], deadline()) == [b"zero"]


def test_an_answer_that_was_not_taken_is_not_sent_again(start, pages):
    class Slow:
        num_sent = 0

        def settimeout(self, seconds):
            pass

        def sendall(self, data):
            self.num_sent += 1
            raise TimeoutError

    server, _ = start()
    client, session = Slow(), PageSession(pages, TOKEN.encode())
    asked = command(b"AUTH", TOKEN.encode()) + command(b"GET", served_name(KEYS[1]))
    with pytest.raises(TimeoutError):
        server._answer(client, session, asked)
    assert client.num_sent == 1


def test_what_was_asked_before_nonsense_is_answered(start):
    _, port = start()
    with socket.create_connection(("127.0.0.1", port), PATIENT_S) as client:
        client.sendall(command(b"AUTH", TOKEN.encode()) + command(b"PING") + b"nonsense")
        with client.makefile("rb") as answers:
            assert answers.read() == b"+OK\r\n+PONG\r\n"


async def test_a_page_larger_than_any_is_not_read(start, reader):
    _, port = start()
    peer = reader(port, max_page_bytes=1000)
    assert await peer.get(KEYS[:2], deadline()) == [None, None]
    assert await peer.get(KEYS[:1], deadline()) == [b"zero"]


def test_bad_pages_cost_trust_for_a_while(reader):
    now = 100.0
    peer = reader(1, clock=lambda: now)
    trust = []
    for _ in range(3):
        trust.append(peer.is_trusted)
        peer.gave_a_bad_page()
    trust.append(peer.is_trusted)
    now += 61
    assert [*trust, peer.is_trusted] == [True, True, True, False, True]


def test_records_are_read_as_written_and_nothing_else_is():
    for host in ("10.0.0.7", "fe80::1", "node-3.example.org", "node-3.example.org."):
        address = ServerAddress(host, 4711, TOKEN)
        assert read_record(address.pack()) == address
        assert TOKEN not in repr(address)
    for record in (b"", b"2 x", b"1 %b 0 host" % TOKEN.encode(), b"1 %b 70000 h" % TOKEN.encode()):
        assert read_record(record) is None


@pytest.mark.parametrize("host", ["", ".", "a..b", ".a", "a..", "a" * 64, "a.b" * 100, "a b", "\n"])
def test_a_host_that_no_resolver_takes_is_in_no_record(host):
    assert read_record(ServerAddress(host, 4711, TOKEN).pack()) is None
    if host:
        with pytest.raises(ValidationError):
            PeersTierConfig(host=host)


def test_the_way_to_the_hot_tier_leads_over_this_node():
    def found(url):
        return own_address(ValkeyAddress(url=url))

    assert found("redis://:pass@127.0.0.1:6379,127.0.0.2:6379/0") == "127.0.0.1"
    assert found("unix:///run/valkey.sock") == "127.0.0.1"


async def test_a_closed_peer_raises_nothing(reader):
    peer = reader(1)
    peer.close()
    assert await peer.contains(KEYS[:1], deadline()) == [False]
    with pytest.raises(TierUnavailableError):
        await peer._server.run(lambda exchange: exchange.contains([b"x"]), deadline())
