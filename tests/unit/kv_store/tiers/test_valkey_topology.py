import time

import pytest

from kv_store import TierUnavailableError
from kv_store.tiers.breaker import CircuitBreaker
from kv_store.tiers.buffers import BufferPool
from kv_store.tiers.valkey_topology import ValkeyAddress, make_topology

PATIENT_S = 60.0
NOBODY = "redis://127.0.0.1:1"


@pytest.mark.parametrize(
    ("address", "why"),
    [
        (ValkeyAddress(url=NOBODY), "refused"),
        (ValkeyAddress(url=NOBODY + "?max_connections=3"), "refused"),
        (ValkeyAddress(url="redis://pages", sentinels=NOBODY), "No master found"),
    ],
    ids=["one server", "a bounded pool", "sentinels"],
)
async def test_a_server_that_was_away_for_many_attempts_is_still_tried(address, why):
    topology = make_topology(
        address,
        connect_timeout_s=PATIENT_S,
        operation_timeout_s=PATIENT_S,
        num_connections=1,
        buffers=BufferPool(),
        make_breaker=lambda: CircuitBreaker(max_failures=1, open_s=1.0, max_open_s=1.0),
    )
    [server] = topology.divide([b"page"])
    for _ in range(120):  # redis-py's pools count up to a hundred
        with pytest.raises(TierUnavailableError, match=why):
            await server.run(
                lambda exchange: exchange.contains([b"page"]), time.monotonic() + PATIENT_S
            )
    topology.close()
