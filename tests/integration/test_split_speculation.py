"""Split speculation over real sockets writes the target's own text."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from deployments.engine.config import PoolTlsConfig, SpeculationConfig
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.grpc_transport import (
    GrpcLimits,
    grpc_connector,
)
from deployments.engine.speculation.pool_link import LinkLimits
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.speculation.transport import TransportState
from deployments.engine.speculation.types import DraftSampling
from tests.certificates import Authority
from tests.chaos.drafts.proxy import DroppingProxy
from tests.fakes_speculation import (
    IDENTITY,
    VOCAB_SIZE,
    ModelDrafter,
    ToyModel,
    ToyTarget,
    random_text,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = SecretStr("a shared secret")
PROMPTS = {f"r{number}": tuple(random_text(number, 12)) for number in range(3)}


@pytest.fixture
def server():
    server = DraftServer(ModelDrafter(ToyModel(seed=5, noise_scale=0.5)), IDENTITY, SECRET)
    yield server
    server.close()


def make_speculator(lost: list[str], local: str = "suffix") -> SplitSpeculator:
    return SplitSpeculator(
        SpeculationConfig(num_draft_tokens=3, fanout=3, local_drafter=local),
        vocab_size=VOCAB_SIZE,
        connect=grpc_connector(IDENTITY, "target-1", SECRET),
        on_link_lost=lost.append,
        limits=LinkLimits(backoff_s=0.02, max_backoff_s=0.1),
    )


def forward() -> None:
    """Stands for the time of a target's forward, the window the pool drafts in."""
    time.sleep(0.003)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_text_as_plain_and_rows_are_hit(server, temperature):
    model = ToyModel(seed=5)
    sampling = DraftSampling(seed=77, temperature=temperature)
    plain = {name: model.generate(prompt, sampling, 60) for name, prompt in PROMPTS.items()}
    endpoint = f"127.0.0.1:{server.start()}"
    speculator = make_speculator([])
    target = ToyTarget(speculator, model, forward=forward)
    try:
        deadline = time.monotonic() + 60
        while speculator.stats().num_pool_accepted_tokens == 0 and time.monotonic() < deadline:
            for name in PROMPTS:
                speculator.attach(name, endpoint)
            assert target.run(PROMPTS, sampling, 60) == plain
            for name in PROMPTS:
                speculator.detach(name)
        stats = speculator.stats()
        assert stats.num_table_hits > 0
        assert stats.num_pool_accepted_tokens > 0
        assert stats.num_tables > 0
        assert 0 < stats.round_trip_p50_s < 60
        assert 0 < stats.pool_batch_time_s < 60
        assert stats.num_links_lost == 0
        wait_until(lambda: server.stats().num_sessions == 0, "the pool forgets ended sessions")
    finally:
        speculator.shutdown()


def test_killed_drafter_costs_no_token_and_a_new_one_takes_over(server):
    model = ToyModel(seed=5)
    sampling = DraftSampling(seed=3, temperature=0.7)
    plain = {name: model.generate(prompt, sampling, 400) for name, prompt in PROMPTS.items()}
    other = DraftServer(ModelDrafter(ToyModel(seed=5)), IDENTITY, SECRET)
    first, second = f"127.0.0.1:{server.start()}", f"127.0.0.1:{other.start()}"
    lost: list[str] = []
    speculator = make_speculator(lost, local="none")
    num_steps = 0

    def step() -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 10:
            wait_until(lambda: server.stats().num_sessions == 3, "the first drafter serves")
            server.close()
            wait_until(lambda: lost[:1] == [first], "the loss is reported")
            for name in PROMPTS:
                speculator.attach(name, second)
        if num_steps == 20:
            wait_until(lambda: other.stats().num_tables >= 3, "the second drafter serves")
        forward()

    target = ToyTarget(speculator, model, forward=step)
    try:
        for name in PROMPTS:
            speculator.attach(name, first)
        assert target.run(PROMPTS, sampling, 400) == plain
        assert other.stats().num_sessions <= 3
        assert speculator.stats().num_links_lost >= 1
    finally:
        speculator.shutdown()
        other.close()


@contextmanager
def proxy_to(port: int) -> Iterator[tuple[DroppingProxy, str]]:
    """Before a server, on a thread of its own, and the endpoint to dial instead."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    proxy = DroppingProxy(port)
    try:
        own_port = asyncio.run_coroutine_threadsafe(proxy.start(), loop).result(60)
        yield proxy, f"127.0.0.1:{own_port}"
    finally:
        asyncio.run_coroutine_threadsafe(end_all(proxy), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


async def end_all(proxy: DroppingProxy) -> None:
    """Nothing runs on the proxy's loop afterwards."""
    proxy.stop()
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_a_drafter_that_is_cut_off_costs_no_token_and_drafts_again_when_it_is_back():
    model = ToyModel(seed=5)
    sampling = DraftSampling(seed=3, temperature=0.7)
    plain = {name: model.generate(prompt, sampling, 200) for name, prompt in PROMPTS.items()}
    impatient = GrpcLimits(
        keepalive_s=1.0
    )  # a stream that lost bytes may hang for half as long again
    server = DraftServer(ModelDrafter(ToyModel(seed=5)), IDENTITY, SECRET, grpc_limits=impatient)
    num_steps = 0

    def step() -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 10:
            wait_until(lambda: server.stats().num_sessions == 3, "it drafts")
            proxy.is_dropping = True
        if num_steps == 60:
            wait_until(lambda: proxy.num_lost > 0, "something is lost")
            proxy.is_dropping = False
        forward()

    with proxy_to(server.start()) as (proxy, endpoint):
        speculator = SplitSpeculator(
            SpeculationConfig(num_draft_tokens=3, fanout=3, local_drafter="none"),
            vocab_size=VOCAB_SIZE,
            connect=grpc_connector(IDENTITY, "target-1", SECRET, limits=impatient),
            limits=LinkLimits(backoff_s=0.02, max_backoff_s=0.1),
        )
        target = ToyTarget(speculator, model, forward=step)
        try:
            num_hits, deadline = 0, time.monotonic() + 120
            while num_hits == 0 and time.monotonic() < deadline:
                before = speculator.stats().num_table_hits
                was_cut = num_steps >= 60
                for name in PROMPTS:
                    speculator.attach(name, endpoint)
                assert target.run(PROMPTS, sampling, 200) == plain
                num_hits = was_cut and speculator.stats().num_table_hits - before
            assert num_hits > 0
        finally:
            speculator.shutdown()
            server.close()


def test_no_drafter_at_all_is_plain_decoding():
    model = ToyModel(seed=5)
    sampling = DraftSampling(seed=3)
    nobody = "127.0.0.1:1"
    lost: list[str] = []
    speculator = make_speculator(lost)

    def until_lost() -> None:
        wait_until(lambda: nobody in lost, "the failed dial is reported")

    try:
        for name in PROMPTS:
            speculator.attach(name, nobody)
        plain = {name: model.generate(prompt, sampling, 40) for name, prompt in PROMPTS.items()}
        target = ToyTarget(speculator, model, forward=until_lost)
        assert target.run(PROMPTS, sampling, 40) == plain
        assert speculator.stats().num_tables == 0
    finally:
        speculator.shutdown()


def test_streams_may_be_encrypted(tmp_path):
    authority = Authority()
    authority.write(tmp_path, ["draft.example"])
    tls = PoolTlsConfig(
        certificate_file=tmp_path / "tls.crt",
        key_file=tmp_path / "tls.key",
        ca_file=tmp_path / "ca.crt",
        server_name="draft.example",
    )
    server = DraftServer(ModelDrafter(ToyModel(seed=5)), IDENTITY, SECRET, tls=tls)
    endpoint = f"127.0.0.1:{server.start()}"

    def is_taken(connect) -> bool:
        stream = connect(endpoint)
        try:
            wait_until(
                lambda: stream.is_alive or stream.state is TransportState.CLOSED, "an answer"
            )
            return stream.welcome is not None
        finally:
            stream.close()

    trusting = grpc_connector(IDENTITY, "target-1", SECRET, tls=tls)
    try:
        assert is_taken(trusting)
        assert not is_taken(grpc_connector(IDENTITY, "target-2", SECRET))
        elsewhere = tls.model_copy(update={"server_name": "elsewhere.example"})
        assert not is_taken(grpc_connector(IDENTITY, "target-3", SECRET, tls=elsewhere))
        # Another authority: both ends read the renewed files, and the old trust is worth nothing.
        kept = (tmp_path / "ca.crt").read_bytes()
        Authority().write(tmp_path, ["draft.example"])
        assert is_taken(trusting)
        (tmp_path / "ca.crt").write_bytes(kept)
        assert not is_taken(trusting)
    finally:
        server.close()
