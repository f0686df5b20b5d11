"""The HTTP side of the ingress: bodies within bounds, event streams, OpenAI-shaped errors."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import aclosing
from typing import TYPE_CHECKING

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router

from deployments.engine.errors import DeadlineExceededError
from deployments.errors import (
    MethodNotAllowedError,
    RequestCancelledError,
    RequestInvalidError,
    RequestTooLargeError,
    RouteNotFoundError,
    describe,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.types import Receive, Scope, Send

    from deployments.errors import ApiError

logger = logging.getLogger(__name__)


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


def json_response(
    body: dict[str, object], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """A JSON answer."""
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """An OpenAI-shaped error."""
    return json_response(error.body(), error.kind.http_status, error.headers())


async def read_body(request: Request, max_bytes: int, deadline: float) -> bytes:
    """The whole body.

    Args:
        request: nothing of its body has been read.
        max_bytes: of the body.
        deadline: seconds since the epoch.

    Raises:
        RequestTooLargeError: it is, or claims to be, longer than ``max_bytes``.
        RequestInvalidError: its length header is no number.
        RequestCancelledError: the client went away before its end.
        DeadlineExceededError: the end did not come in time.
    """
    claimed = request.headers.get("content-length")
    if claimed is not None and not claimed.isdigit():
        raise RequestInvalidError("The Content-Length header is not a number.")
    if claimed is not None and int(claimed) > max_bytes:
        raise RequestTooLargeError(f"The request body is larger than {max_bytes} bytes.")
    body = bytearray()
    try:
        async with asyncio.timeout(deadline - time.time()):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise RequestTooLargeError(
                        f"The request body is larger than {max_bytes} bytes."
                    )
    except ClientDisconnect as error:
        raise RequestCancelledError("The client left before the end of its request.") from error
    except TimeoutError as error:
        raise DeadlineExceededError("The request's deadline passed.") from error
    return bytes(body)


class HttpApp(Router):
    """Paths to handlers; its own errors (no route, wrong method, a bug) have OpenAI's shape too.

    Starlette's routing alone: a framework's layers would cost a request, and every event of a
    stream, more than what is done in them here.
    """

    def __init__(self, *routes: HttpRoute) -> None:
        super().__init__(routes, redirect_slashes=False)

    async def not_found(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request to any other path."""
        if scope["type"] != "http":
            await super().not_found(scope, receive, send)
            return
        missing = f"Unknown request URL: {scope['method']} {scope['path']}."
        await error_response(describe(RouteNotFoundError(missing)))(scope, receive, send)


class HttpRoute(Route):
    """One method of one path.

    Args:
        method: all others are refused.
        path: with parameters as Starlette writes them.
        handler: answers a request.
    """

    def __init__(
        self, method: str, path: str, handler: Callable[[Request], Awaitable[Response]]
    ) -> None:
        super().__init__(path, _Endpoint(handler), methods=[method])
        self._method = method
        self.methods = {method}  # Starlette adds HEAD to GET

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request to the path."""
        if scope["method"] == self._method:
            await self.app(scope, receive, send)
            return
        wrong = f"Method {scope['method']} is not allowed for {scope['path']}."
        response = error_response(describe(MethodNotAllowedError(wrong)))
        response.headers["allow"] = self._method
        await response(scope, receive, send)


class _Endpoint:
    """A handler as an ASGI application."""

    def __init__(self, handler: Callable[[Request], Awaitable[Response]]) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._handler(Request(scope, receive))
        except Exception as error:
            logger.exception("unexpected error at %s", scope["path"])
            response = error_response(describe(error))
        await response(scope, receive, send)
