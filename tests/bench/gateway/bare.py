"""The engine behind both surfaces and nothing else: ``python -m ... <tokenizer folder>``.

What a client and a socket cost is in every figure of a gateway. Asked by the same clients in the
same way, this process tells how much that is. It answers without looking at the prompt, on the
event loop that Ray's workers run on, with a protocol for HTTP that only fits the client here.

Prints its addresses as a line of JSON and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import grpc
import uvloop

from deployments.engine.types import GenerationRequest, SamplingParams
from deployments.tokenizer import ChatTurn, Tokenizer
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from tests.bench.gateway.engine import LETTER, InstantEngine
from tests.bench.gateway.measure import PROMPT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from deployments.engine.types import TokenDelta

_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
_EVENT = {
    "id": "chatcmpl-" + 32 * "0",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "instant",
    "choices": [
        {"index": 0, "delta": {"content": LETTER}, "logprobs": None, "finish_reason": None}
    ],
}


class _Answers:
    """What the engine says to the one prompt."""

    def __init__(self, folder: Path) -> None:
        tokenizer = Tokenizer.load(folder)
        self._prompt = tuple(tokenizer.encode_chat([ChatTurn("user", PROMPT)]))
        self._engine = InstantEngine(tokenizer.encode(LETTER)[0])

    def ask(self, max_tokens: int) -> AsyncIterator[TokenDelta]:
        sampling = SamplingParams(max_tokens=max_tokens, seed=1)
        return self._engine.generate(
            GenerationRequest(request_id="r", prompt_token_ids=self._prompt, sampling=sampling)
        )


class _Http(asyncio.Protocol):
    """One connection, one request after another."""

    def __init__(self, answers: _Answers) -> None:
        self._answers = answers
        self._received = b""
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
        if not end or len(body) < int(length):
            return
        self._received = b""
        self._task = asyncio.get_running_loop().create_task(self._answer(json.loads(body)))

    async def _answer(self, asked: dict[str, object]) -> None:
        deltas = self._answers.ask(cast("int", asked["max_tokens"]))
        if not asked["stream"]:
            text = LETTER * len([delta async for delta in deltas])
            answer = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self._transport.write(_HEAD + b"content-length: %d\r\n\r\n" % len(answer) + answer)
            return
        self._transport.write(_HEAD + b"transfer-encoding: chunked\r\n\r\n")
        async for _ in deltas:
            self._chunk(b"data: " + json.dumps(_EVENT, separators=(",", ":")).encode() + b"\n\n")
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class _Grpc(inference_pb2_grpc.InferenceServicer):
    def __init__(self, answers: _Answers) -> None:
        self._answers = answers

    async def Generate(  # type: ignore[override] # noqa: N802 - the RPC's name
        self, request: pb.GenerateRequest, _: object
    ) -> AsyncIterator[pb.GenerateChunk]:
        async for delta in self._answers.ask(request.sampling.max_tokens):
            yield pb.GenerateChunk(text=LETTER, token_ids=delta.token_ids)

    async def GenerateUnary(  # type: ignore[override] # noqa: N802
        self, request: pb.GenerateRequest, _: object
    ) -> pb.GenerateResponse:
        answer = pb.GenerateResponse()
        choice = answer.choices.add()
        async for delta in self._answers.ask(request.sampling.max_tokens):
            choice.text += LETTER
            choice.token_ids.extend(delta.token_ids)
        return answer


async def _serve(folder: Path) -> None:
    answers = _Answers(folder)
    loop = asyncio.get_running_loop()
    http = await loop.create_server(lambda: _Http(answers), "127.0.0.1", 0)
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(_Grpc(answers), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    addresses = {
        "http": f"http://127.0.0.1:{http.sockets[0].getsockname()[1]}",
        "grpc": f"127.0.0.1:{port}",
    }
    sys.stdout.write(json.dumps(addresses) + "\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)
    http.close()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(Path(sys.argv[1])))
