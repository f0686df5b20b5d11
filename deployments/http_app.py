"""The HTTP side of the ingress: bodies within bounds, event streams, OpenAI-shaped errors."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deployments.errors import (
    MethodNotAllowedError,
    RequestInvalidError,
    RequestTooLargeError,
    RouteNotFoundError,
    describe,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from deployments.errors import ApiError

logger = logging.getLogger(__name__)

_SOON_S = 2.0
_HEARTBEAT_S = 1.0


class EventStream(Response):
    """A server-sent event stream that closes its source however it ends.

    Starlette's own streaming response leaves an abandoned generator to the garbage collector; a
    client that goes away must free its pages at once.
    """

    media_type = "text/event-stream"

    def __init__(self, first: bytes, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            async for event in events:
                if event:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


class HeldAnswer(Response):
    """A JSON answer that takes long: spaces go ahead of it, which JSON allows.

    HAProxy does not notice that a client has left while it waits for a response to begin, if the
    request's body came in a later packet than its head. Writing is what makes it notice, and then
    the sequence ends and its pages are free. An error this late breaks the connection off, since
    the status has been sent.
    """

    media_type = "application/json"

    def __init__(self, answer: asyncio.Task[Response]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer once it is there."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while not self._answer.done():
                await send({"type": "http.response.body", "body": b" ", "more_body": True})
                await asyncio.wait([self._answer], timeout=_HEARTBEAT_S)
            body = self._answer.result().body
            await send({"type": "http.response.body", "body": body, "more_body": False})
        finally:
            self._answer.cancel()


async def answer_or_hold(answer: Coroutine[None, None, Response]) -> Response:
    """The answer if it comes soon, errors included; else a response that waits for it.

    Cancelling the caller cancels the answer.
    """
    task = asyncio.create_task(answer)
    try:
        done, _ = await asyncio.wait([task], timeout=_SOON_S)
    except asyncio.CancelledError:
        task.cancel()
        raise
    return task.result() if done else HeldAnswer(task)


def json_response(
    body: dict[str, object], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """An OpenAI-shaped error."""
    return json_response(error.body(), error.kind.http_status, error.headers())


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        RequestTooLargeError: it is, or claims to be, longer than ``max_bytes``.
        RequestInvalidError: its length header is no number.
    """
    claimed = request.headers.get("content-length")
    if claimed is not None and not claimed.isdigit():
        raise RequestInvalidError("The Content-Length header is not a number.")
    if claimed is not None and int(claimed) > max_bytes:
        raise RequestTooLargeError(f"The request body is larger than {max_bytes} bytes.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            raise RequestTooLargeError(f"The request body is larger than {max_bytes} bytes.")
    return bytes(body)


def build_app() -> FastAPI:
    """An application whose own errors (no route, wrong method, a bug) have OpenAI's shape."""
    app = FastAPI(title="Paceline", docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
    return app


async def _on_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 405:
        wrong = f"Method {request.method} is not allowed for {request.url.path}."
        response = error_response(describe(MethodNotAllowedError(wrong)))
        allow = getattr(error, "headers", None) or {}
        response.headers.update(allow)
        return response
    if status == 404:
        missing = f"Unknown request URL: {request.method} {request.url.path}."
        return error_response(describe(RouteNotFoundError(missing)))
    return error_response(describe(RequestInvalidError("The request could not be read.")))


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("unexpected error at %s", request.url.path, exc_info=error)
    return error_response(describe(error))
