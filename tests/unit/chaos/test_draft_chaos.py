"""The drill's own parts: the proxy that loses bytes, and what is read out of a time line."""

from __future__ import annotations

import asyncio

import pytest

from tests.chaos.drafts.load import Sample
from tests.chaos.drafts.proxy import DroppingProxy
from tests.chaos.drafts.timeline import Timeline
from tests.fakes_async import eventually


@pytest.fixture
async def echo():
    """The port of a server that says everything again."""

    async def serve(reader, writer):
        while data := await reader.read(1024):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield server
    server.close()


@pytest.fixture
async def proxy(echo):
    proxy = DroppingProxy(echo.sockets[0].getsockname()[1])
    yield proxy
    proxy.stop()


async def test_bytes_are_lost_for_as_long_as_told_and_stay_lost(proxy):
    port = await proxy.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one"
    proxy.is_dropping = True
    writer.write(b"two")
    await eventually(lambda: proxy.num_lost == 3)
    proxy.is_dropping = False
    writer.write(b"three")
    assert await reader.readexactly(5) == b"three"
    writer.close()


async def test_connections_are_taken_while_bytes_are_lost(proxy):
    port = await proxy.start()
    proxy.is_dropping = True
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"hello")
    await eventually(lambda: proxy.num_lost == 5)
    writer.close()


async def test_an_end_that_goes_takes_the_other_one_along(proxy):
    port = await proxy.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"one")
    assert await reader.readexactly(3) == b"one"
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()


def timeline(table_rates, begun_at=10, back_at=20):
    """Ten samples a second; table tokens by the second."""
    samples, tokens = [], 0.0
    for tenth in range(10 * len(table_rates)):
        samples.append(Sample(tenth / 10, 3 * tenth, round(tokens)))
        tokens += table_rates[tenth // 10] / 10
    return Timeline(samples=samples, begun_at=begun_at, back_at=back_at)


def test_rates_are_those_between_two_moments():
    line = timeline([20] * 10 + [0] * 10 + [20] * 10)
    assert line.token_rate(0, 10) == pytest.approx(30)
    assert line.table_rate(0, 10) == pytest.approx(20)
    assert line.table_rate(10, 20) == 0


@pytest.mark.parametrize("late", [0, 1, 4])
def test_recovery_ends_with_a_second_of_tokens_from_tables(late):
    line = timeline([20] * 10 + [0] * (10 + late) + [20] * 10)
    # Half as many as before are enough, so half of that second may be without.
    assert line.recovery_s == pytest.approx(max(1.0, late + 0.5), abs=0.15)
    assert line.first_table_token_s == pytest.approx(late + 0.1, abs=0.15)


def test_a_trickle_is_no_recovery():
    line = timeline([20] * 10 + [0] * 10 + [3] * 20)
    assert line.recovery_s is None
    assert line.first_table_token_s is not None
    assert timeline([20] * 10 + [0] * 30).first_table_token_s is None
    assert timeline([0] * 40).recovery_s is None
