"""The drafter thread behind real sockets: alive, stuck or dead."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from deployments.engine.speculation import draft_server
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.errors import DrafterDeadError
from deployments.engine.speculation.grpc_transport import GrpcTransport
from deployments.engine.speculation.transport import TransportState
from protos import draft_pb2
from tests.fakes_speculation import IDENTITY, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = SecretStr("s3cret")


class SickDrafter(Drafter):
    """Stays in its first batch until it is released; then lives on, or ends its thread."""

    def __init__(self, *, is_deadly: bool) -> None:
        self.is_asked = threading.Event()
        self.release = threading.Event()
        self._is_deadly = is_deadly

    def propose(self, queries):
        self.is_asked.set()
        self.release.wait(20)
        if self._is_deadly:
            raise SystemExit
        return [[] for _ in queries]


@pytest.fixture
def drafter(request: pytest.FixtureRequest) -> SickDrafter:
    return SickDrafter(is_deadly=request.param)


@pytest.fixture
def server(drafter: SickDrafter) -> Iterator[DraftServer]:
    server = DraftServer(drafter, IDENTITY, SECRET)
    endpoint = f"127.0.0.1:{server.start()}"
    server.check_health()
    target = GrpcTransport(endpoint, IDENTITY.hello("t"), SECRET)
    wait_until(lambda: target.state is not TransportState.CONNECTING, "an answer to the hello")
    sampling = draft_pb2.Sampling(top_p=1)
    opening = draft_pb2.Open(session=1, epoch=1, token_ids=[1, 2], sampling=sampling)
    commit = draft_pb2.Commit(session=1, epoch=1, round=1, base_len=2, fanout=1)
    target.send(draft_pb2.TargetFrame(opens=[opening], commits=[commit]))
    assert drafter.is_asked.wait(20)
    yield server
    drafter.release.set()
    target.close()
    server.close()


def is_healthy(server: DraftServer) -> bool:
    try:
        server.check_health()
    except DrafterDeadError:
        return False
    return True


@pytest.mark.parametrize("drafter", [False], indirect=True)
def test_a_step_that_does_not_end_is_unhealthy_until_it_does(
    server: DraftServer, drafter: SickDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.check_health()
    monkeypatch.setattr(draft_server, "_HANGS_AFTER_S", 0.01)
    wait_until(lambda: not is_healthy(server), "the hung step is noticed")
    drafter.release.set()
    wait_until(lambda: is_healthy(server), "the step's end is noticed")


@pytest.mark.parametrize("drafter", [True], indirect=True)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_unhealthy(server: DraftServer, drafter: SickDrafter) -> None:
    drafter.release.set()
    wait_until(lambda: not server.is_drafting, "the thread dies")
    with pytest.raises(DrafterDeadError):
        server.check_health()
