"""Real sockets: who is let in, and what garbage does to whom."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import pytest
from pydantic import SecretStr

from deployments.engine.config import SpeculationConfig
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.grpc_transport import (
    METHOD,
    GrpcLimits,
    GrpcTransport,
    grpc_connector,
)
from deployments.engine.speculation.pool_link import LinkLimits
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.speculation.transport import TransportState
from deployments.engine.speculation.types import DraftSampling, SessionSpec
from protos import draft_pb2, draft_pb2_grpc
from tests.fakes_speculation import (
    IDENTITY,
    VOCAB_SIZE,
    ModelDrafter,
    ToyModel,
    ToyTarget,
    wait_until,
)

SECRET = SecretStr("s3cret")
LIMITS = GrpcLimits(max_frame_bytes=64 * 1024, max_streams=4, hello_timeout_s=2.0)


@pytest.fixture
def server():
    server = DraftServer(ModelDrafter(ToyModel(1)), IDENTITY, SECRET, grpc_limits=LIMITS)
    server.endpoint = f"127.0.0.1:{server.start()}"
    yield server
    server.close()
    assert not server.is_drafting


def dial(server, identity=IDENTITY, secret=SECRET) -> GrpcTransport:
    transport = GrpcTransport(server.endpoint, identity.hello("t"), secret, limits=LIMITS)
    wait_until(lambda: transport.state is not TransportState.CONNECTING, "an answer to the hello")
    return transport


def serves(transport: GrpcTransport) -> bool:
    transport.send(
        draft_pb2.TargetFrame(
            opens=[
                draft_pb2.Open(
                    session=1, epoch=1, token_ids=[1, 2], sampling=draft_pb2.Sampling(top_p=1)
                )
            ],
            commits=[draft_pb2.Commit(session=1, epoch=1, round=1, base_len=2, fanout=1)],
        )
    )
    got = []
    wait_until(lambda: got.extend(transport.receive()) or got, "a table")
    return len(got[0].frame.tables) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"vocab_size": 99}, "vocab_size"),
        ({"vocab_digest": "other"}, "vocab_digest"),
        ({"noise_version": 2}, "noise_version"),
        ({"model": "other"}, "model"),
        ({"protocol_version": 1}, "protocol_version"),
    ],
)
def test_a_target_that_does_not_fit_is_told_why(server, change, named):
    transport = dial(server, identity=replace(IDENTITY, **change))
    assert transport.state is TransportState.CLOSED
    assert transport.refusal.startswith("FAILED_PRECONDITION")
    assert named in transport.refusal
    assert server.stats().num_streams == 0


@pytest.mark.parametrize("secret", ["", "wrong", "s3cret "])
def test_the_secret_is_checked(server, secret):
    transport = dial(server, secret=SecretStr(secret))
    assert transport.refusal.startswith("UNAUTHENTICATED")
    assert "s3cret" not in transport.refusal


def test_a_fitting_target_is_served(server):
    transport = dial(server)
    assert transport.is_alive
    assert transport.welcome.max_session_tokens > 0
    assert serves(transport)
    transport.close()
    wait_until(lambda: server.stats().num_streams == 0, "the server forgets the stream")


def test_a_table_is_read_before_a_step_asks_for_it(server):
    speculator = SplitSpeculator(
        SpeculationConfig(local_drafter="none"),
        vocab_size=VOCAB_SIZE,
        connect=grpc_connector(IDENTITY, "t", SECRET, limits=LIMITS),
    )
    try:
        speculator.attach("r1", server.endpoint)
        speculator.open(
            SessionSpec(
                session_id=1,
                request_id="r1",
                tenant="t",
                token_ids=(1, 2, 3),
                sampling=DraftSampling(seed=7),
            )
        )
        wait_until(lambda: speculator.stats().num_tables == 1, "the prompt's table is read")
    finally:
        speculator.shutdown()


def raw_stream(server, frames: list[bytes]):
    """What a client that is not ours may send."""
    channel = grpc.insecure_channel(server.endpoint)
    release = threading.Event()

    def requests():
        yield from frames
        release.wait(60)

    call = channel.stream_stream(METHOD)(
        requests(), metadata=(("authorization", f"Bearer {SECRET.get_secret_value()}"),), timeout=60
    )
    answers = []
    with pytest.raises(grpc.RpcError) as raised:
        answers.extend(call)
    release.set()
    channel.close()
    return raised.value


HELLO = draft_pb2.TargetFrame(hello=IDENTITY.hello("raw")).SerializeToString()


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b"\xff\xff garbage"], grpc.StatusCode.INVALID_ARGUMENT),
        ([HELLO, b"\xff\xff garbage"], grpc.StatusCode.INVALID_ARGUMENT),
        ([draft_pb2.TargetFrame().SerializeToString()], grpc.StatusCode.INVALID_ARGUMENT),
        ([], grpc.StatusCode.INVALID_ARGUMENT),
        ([HELLO, b"\0" * 100_000], grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=["garbage first", "garbage later", "no hello", "silence", "huge"],
)
def test_garbage_ends_its_own_stream_only(server, frames, code):
    neighbour = dial(server)
    assert raw_stream(server, frames).code() is code
    assert neighbour.is_alive
    assert serves(neighbour)
    neighbour.close()


def test_streams_are_bounded(server):
    transports = [dial(server) for _ in range(LIMITS.max_streams)]
    one_more = dial(server)
    assert one_more.state is TransportState.CLOSED
    assert one_more.refusal is None
    transports[0].close()

    def gets_in() -> bool:
        again = dial(server)
        transports.append(again)
        return again.is_alive

    wait_until(gets_in, "the free place is given away")
    for transport in transports:
        transport.close()


class HostileDrafter(draft_pb2_grpc.DraftPoolServicer):
    """Says welcome, then whatever it likes."""

    def __init__(self, answers) -> None:
        self._answers = answers
        self.num_calls = 0

    def Speculate(self, request_iterator, context):  # noqa: N802
        self.num_calls += 1
        next(request_iterator)
        yield draft_pb2.DraftFrame(
            welcome=draft_pb2.Welcome(protocol_version=2, max_session_tokens=10_000)
        ).SerializeToString()
        for frame in request_iterator:
            yield from self._answers(frame)


def table(session: int, epoch: int, round_: int, base_len: int, *rows) -> draft_pb2.Table:
    return draft_pb2.Table(session=session, epoch=epoch, round=round_, base_len=base_len, rows=rows)


def nonsense_for(frame: draft_pb2.TargetFrame) -> list[draft_pb2.DraftFrame]:
    row = draft_pb2.Row(bonus_token_id=1, draft_token_ids=[2])
    tables, resyncs = [], []
    for commit in frame.commits:
        s, e, r, b = commit.session, commit.epoch, commit.round, commit.base_len
        tables += [
            table(s + 100, e, r, b, row),
            table(s, e + 1, r, b, row),
            table(s, e, r + 7, b, row),
            table(s, e, r, b, draft_pb2.Row(node=30)),
            table(s, e, r, b, draft_pb2.Row(bonus_token_id=VOCAB_SIZE)),
            table(s, e, r, b, *([row] * 500)),
            table(s, e, r, b + 1, row),
            table(s, e, r, b, row),
        ]
        resyncs.append(draft_pb2.Resync(session=s, epoch=e, round=r, have_len=b + 99))
    return [draft_pb2.DraftFrame(tables=tables, resyncs=resyncs)]


BEHAVIOURS = {
    "nonsense": lambda frame: [frame.SerializeToString() for frame in nonsense_for(frame)],
    "garbage": lambda _: [b"\xff\xff\xff"],
    "huge": lambda _: [b"\0" * 5_000_000],
    "silence": lambda _: [],
    "drops everything": lambda frame: [
        draft_pb2.DraftFrame(
            drops=[
                draft_pb2.Dropped(session=commit.session, epoch=commit.epoch, reason=1)
                for commit in frame.commits
            ]
        ).SerializeToString()
    ],
}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_hostile_drafter_cannot_change_a_token(behaviour):
    hostile = HostileDrafter(BEHAVIOURS[behaviour])
    threads = ThreadPoolExecutor(4)
    raw = grpc.server(threads)
    handler = grpc.stream_stream_rpc_method_handler(
        hostile.Speculate, request_deserializer=draft_pb2.TargetFrame.FromString
    )
    service, method = METHOD.strip("/").split("/")
    raw.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {method: handler}),)
    )
    endpoint = f"127.0.0.1:{raw.add_insecure_port('127.0.0.1:0')}"
    raw.start()
    speculator = SplitSpeculator(
        SpeculationConfig(num_draft_tokens=3),
        vocab_size=VOCAB_SIZE,
        connect=grpc_connector(IDENTITY, "t", SECRET),
        limits=LinkLimits(backoff_s=0.01, max_backoff_s=0.02),
    )
    model, sampling = ToyModel(1), DraftSampling(seed=1)
    prompts = {"a": (1, 2, 3), "b": (4, 5, 6)}
    plain = {name: model.generate(prompt, sampling, 150) for name, prompt in prompts.items()}
    rounds = 0

    def forward() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            wait_until(lambda: hostile.num_calls > 0, "the target dials")
        if rounds == 5 and behaviour in ("nonsense", "garbage", "huge", "drops everything"):
            # One more take drains what came in; the stats below see it.
            wait_until(
                lambda: (
                    speculator.take([])
                    or speculator.stats().num_malformed
                    or speculator.stats().num_links_lost
                    or speculator.stats().num_sessions_dropped
                ),
                "the hostility is noticed",
            )

    try:
        for name in prompts:
            speculator.attach(name, endpoint)
        assert ToyTarget(speculator, model, forward=forward).run(prompts, sampling, 150) == plain
        stats = speculator.stats()
        assert stats.num_table_hits == stats.num_pool_draft_tokens == 0
    finally:
        speculator.shutdown()
        raw.stop(grace=None).wait()
        threads.shutdown()


def test_a_listener_that_is_no_drafter_times_out():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        lost: list[str] = []
        speculator = SplitSpeculator(
            SpeculationConfig(),
            vocab_size=VOCAB_SIZE,
            connect=grpc_connector(IDENTITY, "t", SECRET),
            on_link_lost=lost.append,
            limits=LinkLimits(connect_timeout_s=0.1),
        )
        speculator.attach("a", endpoint)
        model, sampling = ToyModel(1), DraftSampling(seed=1)
        target = ToyTarget(
            speculator, model, forward=lambda: wait_until(lambda: endpoint in lost, "the timeout")
        )
        try:
            text = target.run({"a": (1, 2, 3)}, sampling, 4)
            assert text["a"] == model.generate((1, 2, 3), sampling, 4)
        finally:
            speculator.shutdown()


def test_a_stream_on_which_nothing_is_said_stays_open():
    # gRPC servers cut off whoever pings often without sending data, unless told how often is fine.
    # They say so at the third ping; a machine that is busy for half a second may miss an answer.
    limits = replace(LIMITS, keepalive_s=1.0)
    server = DraftServer(ModelDrafter(ToyModel(1)), IDENTITY, SECRET, grpc_limits=limits)
    endpoint = f"127.0.0.1:{server.start()}"

    def stays_open() -> bool:
        transport = GrpcTransport(endpoint, IDENTITY.hello("t"), SECRET, limits=limits)
        try:
            wait_until(lambda: transport.state is TransportState.OPEN, "a welcome")
            time.sleep(5 * limits.keepalive_s)
            return transport.state is TransportState.OPEN and serves(transport)
        finally:
            transport.close()

    try:
        assert any(stays_open() for _ in range(4))
    finally:
        server.close()
