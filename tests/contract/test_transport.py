"""What both ends of a stream promise, in memory and over real sockets."""

import threading

import pytest
from pydantic import SecretStr

from deployments.engine.speculation.fake_transport import FakeNetwork
from deployments.engine.speculation.grpc_server import GrpcDraftFront
from deployments.engine.speculation.grpc_transport import GrpcLimits, GrpcTransport
from deployments.engine.speculation.transport import TransportState
from protos import draft_pb2
from tests.fakes_speculation import IDENTITY, wait_until

SECRET = SecretStr("s")


@pytest.fixture(params=["fake", "grpc"])
def ends(request):
    accepted = []
    if request.param == "fake":
        network = FakeNetwork(seed=1, capacity=8)
        network.listen("here:1", IDENTITY, accepted.append, 1_000)
        target = network.connector(IDENTITY)("here:1")
        yield target, accepted[0]
        return
    limits = GrpcLimits(max_queued_frames=8)
    front = GrpcDraftFront(
        IDENTITY,
        SECRET,
        welcome=draft_pb2.Welcome(protocol_version=1, max_session_tokens=1_000),
        accept=accepted.append,
        on_arrival=lambda: None,
        limits=limits,
    )
    port = front.start("127.0.0.1")
    target = GrpcTransport(f"127.0.0.1:{port}", IDENTITY.hello("t"), SECRET, limits=limits)
    wait_until(lambda: target.is_alive and accepted, "the handshake")
    yield target, accepted[0]
    target.close()
    front.stop()


def to_draft(number: int, num_tokens: int = 0) -> draft_pb2.TargetFrame:
    commit = draft_pb2.Commit(session=number, committed=[1] * num_tokens)
    return draft_pb2.TargetFrame(commits=[commit])


def to_target(number: int, num_rows: int = 0) -> draft_pb2.DraftFrame:
    rows = [draft_pb2.Row(bonus_token_id=1)] * num_rows
    return draft_pb2.DraftFrame(tables=[draft_pb2.Table(session=number, rows=rows)])


def receive(end, count: int) -> list:
    got = []

    def enough() -> bool:
        got.extend(end.receive())
        return len(got) >= count

    wait_until(enough, f"{count} frames")
    return [frame for frame, _ in got]


def test_handshake_is_over_and_unseen(ends):
    target, draft = ends
    assert target.state is draft.state is TransportState.OPEN
    assert target.welcome.max_session_tokens == 1_000
    assert target.refusal is None
    assert target.receive() == []
    assert draft.receive() == []


def test_frames_arrive_whole_and_in_order_both_ways(ends):
    target, draft = ends
    for number in range(5):
        assert target.send(to_draft(number, 100))
        assert draft.send(to_target(number, 3))
    assert receive(draft, 5) == [to_draft(number, 100) for number in range(5)]
    assert receive(target, 5) == [to_target(number, 3) for number in range(5)]
    assert target.receive() == []


def test_sending_never_waits_for_a_peer_that_does_not_listen(ends):
    target, _ = ends
    results = []
    frame = to_draft(1, 20_000)
    sender = threading.Thread(
        target=lambda: results.extend(target.send(frame) for _ in range(2_000)), daemon=True
    )
    sender.start()
    sender.join(timeout=30)
    assert not sender.is_alive()
    num_refused = results.count(False)
    assert num_refused > 0
    assert target.num_dropped == num_refused


def test_a_target_that_does_not_look_keeps_the_newest(ends):
    target, draft = ends
    sent = 0
    for number in range(100):
        sent += draft.send(to_target(number))
    assert 8 <= sent <= 100
    assert len(target.receive()) <= 8 or target.num_dropped == 0


@pytest.mark.parametrize("who", ["target", "draft"])
def test_either_end_may_close(ends, who):
    target, draft = ends
    (target if who == "target" else draft).close()
    wait_until(
        lambda: target.state is TransportState.CLOSED and draft.state is TransportState.CLOSED,
        "both ends notice",
    )
    assert not target.send(to_draft(1))
    assert not draft.send(to_target(1))
    assert target.receive() == []
    assert target.refusal is None
    target.close()
    draft.close()
