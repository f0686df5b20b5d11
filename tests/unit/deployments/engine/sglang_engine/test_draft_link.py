"""The socket between actor and scheduler, with both of its ends."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from pydantic import SecretStr

from deployments.engine.config import SpeculationConfig
from deployments.engine.sglang_engine.draft_client import DraftClient
from deployments.engine.sglang_engine.draft_link import DraftLink, DraftSettings
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.types import DraftSampling, SessionSpec
from tests.fakes_speculation import IDENTITY, ModelDrafter, ToyModel, wait_until

SECRET = SecretStr("a shared secret")
SETTINGS = DraftSettings(
    SpeculationConfig(num_draft_tokens=3, fanout=3, local_drafter="none"),
    IDENTITY,
    "target-1",
    SECRET,
)
SPEC = SessionSpec(
    session_id=1,
    request_id="r1",
    tenant="t",
    token_ids=(1, 2, 3),
    sampling=DraftSampling(seed=7),
)


@pytest.fixture
def lost():
    return []


@pytest.fixture
def link(lost):
    link = DraftLink(SETTINGS, lost.append)
    yield link
    link.shutdown()


def test_the_scheduler_gets_the_settings_and_the_secret_stays_one(link):
    client = DraftClient(link.address, takes_trees=False)
    try:
        assert client.settings == SETTINGS
        assert SECRET.get_secret_value() not in repr(client.settings)
    finally:
        client.close()


def test_only_this_user_can_reach_the_socket(link):
    assert stat.S_IMODE(Path(link.address).parent.stat().st_mode) == 0o700


def test_a_request_is_served_by_the_replica_that_was_attached_and_its_loss_is_told(link, lost):
    server = DraftServer(ModelDrafter(ToyModel(seed=5)), IDENTITY, SECRET)
    endpoint = f"127.0.0.1:{server.start()}"
    link.attach("r1", endpoint)  # before the scheduler is there
    client = DraftClient(link.address, takes_trees=False)
    try:
        client.speculator.open(SPEC)
        wait_until(lambda: server.stats().num_sessions == 1, "the session is open there")
        wait_until(lambda: link.stats().num_links_up == 1, "the actor hears the counters")
        server.close()
        wait_until(lambda: lost == [endpoint], "the actor hears of the loss")
    finally:
        client.close()
        server.close()


def test_the_actor_hears_what_drafts_cost_a_step(link):
    client = DraftClient(link.address, takes_trees=False)
    try:
        for milliseconds in (0.1, 0.3, 0.2):
            client.stalls.add(milliseconds / 1e3)
        wait_until(lambda: link.stats().stall_p50_s == 0.2 / 1e3, "the actor hears the median")
        for _ in range(2000):  # old steps are forgotten
            client.stalls.add(0.5)
        wait_until(lambda: link.stats().stall_p50_s == 0.5, "the actor hears the new median")
    finally:
        client.close()


def test_a_detached_request_leaves_its_replica(link):
    server = DraftServer(ModelDrafter(ToyModel(seed=5)), IDENTITY, SECRET)
    client = DraftClient(link.address, takes_trees=False)
    try:
        client.speculator.open(SPEC)
        link.attach("r1", f"127.0.0.1:{server.start()}")
        wait_until(lambda: server.stats().num_sessions == 1, "the session is open there")
        link.detach("r1")
        wait_until(lambda: server.stats().num_sessions == 0, "it is closed")
    finally:
        client.close()
        server.close()


def test_either_end_may_leave_first():
    link = DraftLink(SETTINGS, print)
    client = DraftClient(link.address, takes_trees=False)
    link.shutdown()
    client.close()
    link = DraftLink(SETTINGS, print)
    DraftClient(link.address, takes_trees=False).close()
    link.attach("r1", "127.0.0.1:1")
    link.shutdown()


def test_a_link_that_no_scheduler_ever_came_to_is_shut_down():
    link = DraftLink(SETTINGS, print)
    link.attach("r1", "127.0.0.1:1")
    link.shutdown()
    link.shutdown()
    assert not Path(link.address).exists()
