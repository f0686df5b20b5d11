from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from deployments import draft_sessions
from deployments.draft_sessions import DraftSessions

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class Pool:
    """A draft pool: endpoints handed out in turn; empty means that choosing waits."""

    def __init__(self, *endpoints: str | None) -> None:
        self.endpoints = list(endpoints)
        self.held: list[str | None] = []
        self.fails = 0

    @asynccontextmanager
    async def choose_replica(self) -> AsyncIterator[SimpleNamespace]:
        if self.fails:
            self.fails -= 1
            raise RuntimeError("no router")
        while not self.endpoints:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        endpoint = self.endpoints.pop(0)
        self.held.append(endpoint)
        try:
            yield SimpleNamespace(
                replica_id="d", replica_metadata={"draft_endpoint": endpoint} if endpoint else {}
            )
        finally:
            self.held.remove(endpoint)


class Links:
    def __init__(self) -> None:
        self.attached: dict[str, str] = {}

    def attach(self, request_id: str, endpoint: str) -> None:
        self.attached[request_id] = endpoint

    def detach(self, request_id: str) -> None:
        del self.attached[request_id]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_sessions, "_RETRY_S", 0.001)
    monkeypatch.setattr(draft_sessions, "_MAX_RETRY_S", 0.001)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_session_holds_a_replica_for_its_life() -> None:
    pool, links = Pool("h:1"), Links()
    sessions = DraftSessions(pool, links)
    with sessions.session("r"):
        await until(lambda: links.attached == {"r": "h:1"})
        assert pool.held == ["h:1"]
        assert sessions.num_attached == 1
    await until(lambda: not pool.held)
    assert links.attached == {}
    assert sessions.num_attached == 0


async def test_an_endpoint_is_forgotten_with_its_last_session() -> None:
    pool, links = Pool("h:1", "h:1", "h:2"), Links()
    sessions = DraftSessions(pool, links)
    with sessions.session("a"):
        await until(lambda: "a" in links.attached)
        with sessions.session("b"), sessions.session("c"):
            await until(lambda: len(links.attached) == 3)
        await until(lambda: dict(sessions._lost).keys() == {"h:1"})
    await until(lambda: not sessions._lost)


async def test_a_lost_link_is_replaced_for_its_sequences_only() -> None:
    pool, links = Pool("h:1", "h:2", "h:3"), Links()
    sessions = DraftSessions(pool, links)
    with sessions.session("a"):
        await until(lambda: "a" in links.attached)
        with sessions.session("b"):
            await until(lambda: "b" in links.attached)
            threading.Thread(target=sessions.link_lost, args=("h:1",)).start()
            await until(lambda: links.attached == {"a": "h:3", "b": "h:2"})
            assert pool.held == ["h:2", "h:3"]
    await sessions.close()
    assert pool.held == []


@pytest.mark.parametrize("pool", [Pool(), Pool(None, None, None)], ids=["empty", "no endpoint"])
async def test_without_a_usable_replica_the_request_just_goes_on(pool: Pool) -> None:
    links = Links()
    sessions = DraftSessions(pool, links)
    with sessions.session("r"):
        await asyncio.sleep(0.02)
        assert links.attached == {}
    await sessions.close()
    assert pool.held == []


async def test_a_failing_choice_is_tried_again() -> None:
    pool, links = Pool("h:1"), Links()
    pool.fails = 3
    sessions = DraftSessions(pool, links)
    with sessions.session("r"):
        await until(lambda: links.attached == {"r": "h:1"})
    await sessions.close()
