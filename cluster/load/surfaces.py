"""The surfaces that load goes through: OpenAI's HTTP and our gRPC."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import grpc
import httpx

from protos import inference_pb2, inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from cluster.load.workload import LoadRequest

_CONNECT_TIMEOUT_S = 5.0
_TOO_MANY = 429


class RefusedError(Exception):
    """The server does not take the request now: a load limit, no fault."""


class BrokenError(Exception):
    """The server, or the way to it, failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Tokens of a request, as the server tells at its end."""

    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One event of a stream: whether it brings text, and the usage on the last one."""

    has_text: bool
    counts: Counts | None = None


class Surface(Protocol):
    """One way to ask."""

    name: str

    def ask(self, request: LoadRequest, timeout_s: float) -> AsyncGenerator[Piece]:
        """Stream an answer.

        Raises:
            RefusedError: too much load.
            BrokenError: anything else.
        """
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


class HttpSurface:
    """Chat for texts and completions for token ids, streamed; any OpenAI-compatible server."""

    name = "http"

    def __init__(self, url: str, model: str, api_key: str | None, temperature: float) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Open-loop load: a pool that made requests wait for a connection would hide a slow server.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx.AsyncClient(base_url=url, headers=headers, limits=limits)
        self._common = {"model": model, "temperature": temperature, "stream": True}
        self._common["stream_options"] = {"include_usage": True}

    async def ask(self, request: LoadRequest, timeout_s: float) -> AsyncGenerator[Piece]:
        """See ``Surface``."""
        path, body = self._body(request)
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
        try:
            async with self._http.stream("POST", path, json=body, timeout=timeout) as response:
                if response.is_error:
                    await response.aread()
                    kind = RefusedError if response.status_code == _TOO_MANY else BrokenError
                    raise kind(f"{response.status_code}: {_message(response)}")
                async for line in response.aiter_lines():
                    data = line.removeprefix("data: ")
                    if data != line and data != "[DONE]":
                        yield _piece(json.loads(data))
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
            # Any server may be asked, and an event may be any JSON.
            raise BrokenError(f"{type(error).__name__}: {error}") from error

    def _body(self, request: LoadRequest) -> tuple[str, dict[str, Any]]:
        body = self._common | {"max_tokens": request.max_tokens}
        if request.ignore_eos:
            body["ignore_eos"] = True
        if isinstance(request.prompt, str):
            messages = [{"role": "user", "content": request.prompt}]
            return "/v1/chat/completions", body | {"messages": messages}
        return "/v1/completions", body | {"prompt": list(request.prompt)}

    async def close(self) -> None:
        """See ``Surface``."""
        await self._http.aclose()


class GrpcSurface:
    """``Inference.Generate`` over one channel."""

    name = "grpc"

    def __init__(self, address: str, model: str, api_key: str | None, temperature: float) -> None:
        self._channel = grpc.aio.insecure_channel(address)
        self._generate = inference_pb2_grpc.InferenceStub(self._channel).Generate
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._model = model
        self._temperature = temperature

    async def ask(self, request: LoadRequest, timeout_s: float) -> AsyncGenerator[Piece]:
        """See ``Surface``."""
        message = inference_pb2.GenerateRequest(
            model=self._model,
            sampling=inference_pb2.SamplingOptions(
                temperature=self._temperature,
                max_tokens=request.max_tokens,
                ignore_eos=request.ignore_eos,
            ),
        )
        if isinstance(request.prompt, str):
            message.chat.messages.add(role="user", content=request.prompt)
        else:
            message.token_ids.ids.extend(request.prompt)
        call = self._generate(message, timeout=timeout_s, metadata=self._metadata)
        try:
            async for chunk in call:
                counts = None
                if chunk.HasField("usage"):
                    counts = Counts(
                        num_prompt_tokens=chunk.usage.prompt_tokens,
                        num_output_tokens=chunk.usage.completion_tokens,
                        num_cached_tokens=chunk.usage.cached_tokens,
                    )
                yield Piece(bool(chunk.text), counts)
        except grpc.aio.AioRpcError as error:
            is_refusal = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            kind = RefusedError if is_refusal else BrokenError
            raise kind(f"{error.code().name}: {error.details()}") from error

    async def close(self) -> None:
        """See ``Surface``."""
        await self._channel.close()


def surfaces(
    names: Sequence[str],
    *,
    http_url: str,
    grpc_address: str,
    model: str,
    api_key: str | None,
    temperature: float,
) -> list[Surface]:
    """The surfaces of these names."""
    made: list[Surface] = []
    for name in names:
        if name == HttpSurface.name:
            made.append(HttpSurface(http_url, model, api_key, temperature))
        else:
            made.append(GrpcSurface(grpc_address, model, api_key, temperature))
    return made


def _piece(event: dict[str, Any]) -> Piece:
    if "error" in event:
        raise BrokenError(str(event["error"].get("message", "the stream failed")))
    choices = event.get("choices") or [{}]
    text = choices[0].get("text") or (choices[0].get("delta") or {}).get("content")
    usage = event.get("usage")
    if not usage:
        return Piece(bool(text))
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    counts = Counts(
        num_prompt_tokens=usage["prompt_tokens"],
        num_output_tokens=usage["completion_tokens"],
        num_cached_tokens=cached,
    )
    return Piece(bool(text), counts)


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return response.text[:200]
