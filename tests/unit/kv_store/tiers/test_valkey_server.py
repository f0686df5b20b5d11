"""What a shard's breaker counts."""

import asyncio
import threading
import time

import pytest

from kv_store.errors import TierBusyError, TierRefusedError, TierUnavailableError
from kv_store.tiers.breaker import CircuitBreaker
from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.valkey_server import ValkeyServer
from tests.unit.kv_store.tiers.test_valkey_connection import (
    PATIENT_S,
    FakeRedisConnection,
    answering,
)


@pytest.fixture
def breaker():
    return CircuitBreaker(max_failures=1, open_s=1.0, max_open_s=1.0)


@pytest.fixture
def server(peers, breaker):
    server = ValkeyServer(
        lambda: FakeRedisConnection(peers),
        num_connections=1,
        buffers=BufferPool(),
        breaker=breaker,
    )
    yield server
    server.close()


def is_held(exchange):
    return exchange.contains([b"page"])


def soon():
    return time.monotonic() + PATIENT_S


async def test_a_wait_behind_others_is_no_failure_of_the_server(server, breaker, peers):
    thread = answering(peers, b":1\r\n", b":1\r\n")
    assert await server.run(is_held, soon()) == [True]
    gate = threading.Event()
    first = asyncio.create_task(server.run(lambda _: gate.wait(PATIENT_S), soon()))
    late = asyncio.create_task(server.run(is_held, time.monotonic()))
    await asyncio.sleep(0)  # both are queued
    gate.set()
    assert await first
    with pytest.raises(TierBusyError):
        await late
    assert breaker.is_closed
    assert await server.run(is_held, soon()) == [True]
    assert len(peers) == 1
    thread.join()


async def test_a_server_that_says_no_has_answered(server, breaker, peers):
    thread = answering(peers, b"-OOM command not allowed\r\n", b":1\r\n")
    with pytest.raises(TierRefusedError, match="OOM"):
        await server.run(is_held, soon())
    assert breaker.is_closed
    assert await server.run(is_held, soon()) == [True]
    thread.join()


async def test_a_server_that_makes_no_sense_is_left_alone(server, breaker, peers):
    thread = answering(peers, b"?what\r\n")
    with pytest.raises(TierUnavailableError, match="ProtocolError"):
        await server.run(is_held, soon())
    thread.join()
    with pytest.raises(TierUnavailableError, match="left alone"):
        await server.run(is_held, soon())
    assert len(peers) == 1
