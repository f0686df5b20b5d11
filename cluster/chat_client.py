"""A small client of the OpenAI-compatible surface, for the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import httpx

from cluster.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

# Between two events of a stream, and before the first: a queue or a long prompt takes its time.
_EVENT_TIMEOUT_S = 300.0
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ChatPart:
    """A piece of an answer; the last one carries the usage.

    Attributes:
        usage: OpenAI's token counts, None before the last part.
    """

    text: str
    usage: dict[str, Any] | None = None


class ChatClient:
    """Streams chat completions from one server."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """Prepare; nothing is sent yet.

        Args:
            url: the server, without ``/v1``.
            api_key: where authentication is on.

        Raises:
            ConfigError: there is no such URL, or no header can hold the key.
        """
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ConfigError(("--api-key: visible ASCII characters only",))
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx.Timeout(_EVENT_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout)
        except httpx.InvalidURL as error:
            raise ConfigError((f"--url: {error}",)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def model(self) -> str:
        """The id of the model served.

        Raises:
            RequestError: the server refuses or cannot be reached.
        """
        try:
            response = self._http.get("/v1/models")
            _check(response)
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise RequestError(f"{self._http.base_url}: {error}") from error

    def stream(
        self, model: str, messages: Sequence[dict[str, str]], **options: object
    ) -> Iterator[ChatPart]:
        """Stream one answer.

        Args:
            model: its id.
            messages: the conversation, OpenAI's form.
            options: further fields of the request.

        Raises:
            RequestError: the server refuses, fails midway or cannot be reached.
        """
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        body["stream_options"] = {"include_usage": True}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                _check(response)
                for line in response.iter_lines():
                    data = line.removeprefix("data: ")
                    if data != line and data != "[DONE]":
                        yield _part(json.loads(data))
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise RequestError(f"{self._http.base_url}: {error or type(error).__name__}") from error

    def usage(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Have a request answered at once, and say what it took.

        Args:
            path: of the surface.
            body: of the request, OpenAI's form.

        Returns:
            OpenAI's token counts.

        Raises:
            RequestError: the server refuses or cannot be reached.
        """
        try:
            response = self._http.post(path, json=body)
            _check(response)
            return dict(response.json()["usage"])
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise RequestError(f"{self._http.base_url}: {error or type(error).__name__}") from error


def _part(event: dict[str, Any]) -> ChatPart:
    if "error" in event:
        raise RequestError(str(event["error"].get("message", "the stream failed")))
    choices = event.get("choices") or [{}]
    text = (choices[0].get("delta") or {}).get("content") or ""
    return ChatPart(text, event.get("usage"))


def _check(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text[:200]
    raise RequestError(f"{response.status_code}: {message}")
