"""Paths, methods and bugs of the HTTP side, without a server."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import httpx
import pytest

from deployments.http_app import EventStream, HttpApp, HttpRoute, json_response, read_body

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request
    from starlette.responses import Response


async def echo(request: Request) -> Response:
    body = await read_body(request, 100, time.time() + 60)
    return json_response({"model": request.path_params.get("model"), "body": body.decode()})


async def bug(_: Request) -> Response:
    raise KeyError("secret prompt")


async def stream(_: Request) -> Response:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"two"
        yield b""
        yield b"three"

    return EventStream(b"one", events())


@pytest.fixture
def http() -> httpx.AsyncClient:
    app = HttpApp(
        HttpRoute("POST", "/v1/echo", echo),
        HttpRoute("GET", "/v1/models", echo),
        HttpRoute("GET", "/v1/models/{model:path}", echo),
        HttpRoute("POST", "/bug", bug),
        HttpRoute("GET", "/stream", stream),
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


async def test_paths_and_their_parameters_reach_their_handlers(http: httpx.AsyncClient) -> None:
    assert (await http.post("/v1/echo", content="hi")).json() == {"model": None, "body": "hi"}
    assert (await http.get("/v1/models")).json()["model"] is None
    assert (await http.get("/v1/models/org/name")).json()["model"] == "org/name"
    assert (await http.get("/stream")).content == b"onetwothree"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/echo/", "/openapi.json", "/docs"])
async def test_other_paths_are_not_found(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert path in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", "/v1/echo", "POST"), ("POST", "/v1/models", "GET"), ("HEAD", "/v1/models/m", "GET")],
)
async def test_other_methods_are_told_which_one_is_allowed(
    http: httpx.AsyncClient, method: str, path: str, allowed: str
) -> None:
    answer = await http.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


async def test_a_bug_is_an_error_that_tells_nothing(http: httpx.AsyncClient) -> None:
    answer = await http.post("/bug")
    assert answer.status_code == 500
    assert "secret" not in answer.text


async def test_other_protocols_are_closed() -> None:
    said = []

    async def send(message: dict[str, object]) -> None:
        said.append(message["type"])

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    await HttpApp()({"type": "websocket", "path": "/"}, receive, send)
    assert said == ["websocket.close"]
