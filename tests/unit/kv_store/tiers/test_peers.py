"""Readers of several page servers on loopback, with fewer connections than servers."""

import asyncio
import threading

import pytest

from kv_store import PeersTierConfig
from kv_store.tiers import peers
from kv_store.tiers.breaker import CircuitBreaker
from kv_store.tiers.page_directory import ServerAddress
from kv_store.tiers.page_server import PageServer
from kv_store.tiers.peers import PeerTier
from tests.kv_pages import make_chain, make_layout, wait_until

KEYS = make_chain(make_layout(), 3)
TOKEN = "0123456789abcdef0123456789abcdef"
PATIENT_S = 60.0


class Directory(dict):
    """Of a server for each page."""

    async def find(self, keys):
        return [self[key] for key in keys]

    async def forget(self, keys):
        pass

    def close(self):
        pass


class Pages(dict):
    """A source that gives nothing before a test lets it."""

    def __init__(self, pages):
        super().__init__(pages)
        self.num_asked = 0
        self.may_give = threading.Event()
        self.may_give.set()

    def contains(self, key):
        return key in self

    def read(self, key):
        self.num_asked += 1
        assert self.may_give.wait(PATIENT_S)
        return self.get(key)


@pytest.fixture
def sources():
    return [Pages({key: b"page %d" % key.index}) for key in KEYS]


@pytest.fixture
async def tier(sources):
    servers = [
        PageServer(source, token=TOKEN.encode(), max_clients=8, max_reads=2) for source in sources
    ]
    addresses = [ServerAddress("127.0.0.1", s.start("127.0.0.1"), TOKEN) for s in servers]
    tier = PeerTier(
        PeersTierConfig(connect_timeout_s=PATIENT_S, operation_timeout_s=PATIENT_S),
        Directory(zip(KEYS, addresses, strict=True)),
        max_page_bytes=1000,
        make_breaker=lambda: CircuitBreaker(max_failures=1, open_s=60, max_open_s=60),
    )
    yield tier
    await tier.aclose()
    for server in servers:
        server.close()


async def test_more_servers_than_connections_do_not_disturb_reads_under_way(
    tier, sources, monkeypatch
):
    monkeypatch.setattr(peers, "_MAX_CONNECTED", 1)
    sources[0].may_give.clear()
    slow = asyncio.create_task(tier.get_many(KEYS[:1]))
    await asyncio.to_thread(wait_until, lambda: sources[0].num_asked)
    assert await tier.get_many(KEYS[1:]) == [b"page 1", b"page 2"]
    sources[0].may_give.set()
    assert await slow == [b"page 0"]
    assert await tier.get_many(KEYS) == [b"page 0", b"page 1", b"page 2"]


async def test_a_server_that_is_hung_up_on_is_not_trusted_more_for_it(tier, sources, monkeypatch):
    monkeypatch.setattr(peers, "_MAX_CONNECTED", 1)
    for _ in range(3):
        assert await tier.get_many(KEYS[:1]) == [b"page 0"]
        await tier.delete_many(KEYS[:1])
    assert await tier.get_many(KEYS[1:]) == [b"page 1", b"page 2"]
    assert await tier.get_many(KEYS[:1]) == [None]
    assert sources[0].num_asked == 3


async def test_what_is_known_of_servers_is_bounded(tier, monkeypatch):
    monkeypatch.setattr(peers, "_MAX_CONNECTED", 1)
    monkeypatch.setattr(peers, "_MAX_PEERS", 2)
    for _ in range(2):
        assert await tier.get_many(KEYS) == [b"page 0", b"page 1", b"page 2"]
    assert len(tier._peers) <= 3
