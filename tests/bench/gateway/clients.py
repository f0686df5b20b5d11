"""Thin clients, so that what is measured is the way to the engine and not the client.

Each is a ``cluster.load.surfaces.Surface``. They take one prompt, which the direct call has in
tokens already: finding them is part of what the ingress adds.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import grpc

from cluster.load.surfaces import BrokenError, Counts, Piece
from deployments.engine.types import GenerationRequest, SamplingParams
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cluster.load.workload import LoadRequest
    from deployments.engine.base import Engine

_NO_COUNTS = Counts(num_prompt_tokens=0, num_output_tokens=0, num_cached_tokens=0)
"""The generator wants a stream's end to be marked; nobody counts tokens here."""


class Direct:
    """A call of the engine in this process."""

    def __init__(self, name: str, engine: Engine, prompt_token_ids: tuple[int, ...]) -> None:
        self.name = name
        self._engine = engine
        self._prompt = prompt_token_ids
        self._number = 0

    async def ask(self, request: LoadRequest, timeout_s: float) -> AsyncGenerator[Piece]:
        """See ``Surface``."""
        del timeout_s
        self._number += 1
        asked = GenerationRequest(
            request_id=str(self._number),
            prompt_token_ids=self._prompt,
            sampling=SamplingParams(max_tokens=request.max_tokens, seed=1),
        )
        async for delta in self._engine.generate(asked):
            ended = delta.finish_reason is not None
            yield Piece(has_text=True, counts=_NO_COUNTS if ended else None)

    async def close(self) -> None:
        """See ``Surface``."""


class Http:
    """Chat completions over kept connections, written and read by hand.

    Args:
        stream: whether answers come as events or whole.
    """

    def __init__(self, name: str, url: str, model: str, *, stream: bool) -> None:
        self.name = name
        address = urlsplit(url)
        self._host, self._port = address.hostname, address.port
        self._common = {"model": model, "temperature": 0.0, "stream": stream}
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, request: LoadRequest, timeout_s: float) -> AsyncGenerator[Piece]:
        """See ``Surface``."""
        del timeout_s
        messages = [{"role": "user", "content": request.prompt}]
        body = json.dumps(
            self._common | {"messages": messages, "max_tokens": request.max_tokens}
        ).encode()
        reader, writer = self._idle.pop() if self._idle else await self._connect()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            if not answer.startswith(b"http/1.1 200"):
                raise BrokenError(answer.partition(b"\r\n")[0].decode())
            if b"transfer-encoding: chunked" in answer:
                while part := await _chunk(reader):
                    for _ in range(part.count(b'"content":"a')):
                        yield Piece(has_text=True)
            else:
                length = answer.partition(b"content-length:")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length))
                yield Piece(has_text=True)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise BrokenError(f"{type(error).__name__}: {error}") from error
        if b"connection: close" in answer:  # HAProxy makes way for its successor
            writer.close()
        else:
            self._idle.append((reader, writer))
        yield Piece(has_text=False, counts=_NO_COUNTS)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self._host, self._port)

    async def close(self) -> None:
        """See ``Surface``."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


class Grpc:
    """``Inference`` over one channel.

    Args:
        stream: ``Generate``, or ``GenerateUnary``.
    """

    def __init__(self, name: str, address: str, model: str, *, stream: bool) -> None:
        self.name = name
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._model = model
        self._stream = stream

    async def ask(self, request: LoadRequest, timeout_s: float) -> AsyncGenerator[Piece]:
        """See ``Surface``."""
        message = pb.GenerateRequest(
            model=self._model,
            sampling=pb.SamplingOptions(temperature=0.0, max_tokens=request.max_tokens),
        )
        message.chat.messages.add(role="user", content=str(request.prompt))
        try:
            if self._stream:
                async for chunk in self._stub.Generate(message, timeout=timeout_s):
                    if chunk.text:
                        yield Piece(has_text=True)
            else:
                await self._stub.GenerateUnary(message, timeout=timeout_s)
                yield Piece(has_text=True)
        except grpc.aio.AioRpcError as error:
            raise BrokenError(f"{error.code().name}: {error.details()}") from error
        yield Piece(has_text=False, counts=_NO_COUNTS)

    async def close(self) -> None:
        """See ``Surface``."""
        await self._channel.close()


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    """One chunk of a chunked body; empty at its end."""
    size = int(await reader.readuntil(b"\r\n"), 16)
    return (await reader.readexactly(size + 2))[:-2]
