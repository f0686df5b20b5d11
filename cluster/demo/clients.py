"""The two ways into a cluster, as a user of the public SDKs would take them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import grpc
import openai

from protos import inference_pb2 as pb
from protos import inference_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from cluster.state import ClusterState

_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One finished answer.

    Attributes:
        ttft_s: from the request to its first text.
        duration_s: from the request to its end.
        replica: the target replica that wrote it.
        speculation: as reported with the usage; empty where nothing was drafted.
    """

    text: str
    ttft_s: float
    duration_s: float
    num_tokens: int
    num_cached_tokens: int
    replica: str
    speculation: dict[str, Any]


class DemoClients:
    """An OpenAI client and a gRPC client of the same cluster."""

    def __init__(self, state: ClusterState, api_key: str) -> None:
        self._model = state.model
        self._openai = openai.OpenAI(
            base_url=f"{state.http_url}/v1", api_key=api_key, timeout=_TIMEOUT_S, max_retries=0
        )
        self._channel = grpc.insecure_channel(state.grpc_address)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._openai.close()
        self._channel.close()

    def over_http(
        self,
        prompt: str,
        *,
        temperature: float,
        seed: int,
        max_tokens: int,
        speculation: bool = True,
        avoid_replica: str | None = None,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """Stream a chat completion.

        Raises:
            openai.OpenAIError: the request failed.
        """
        started = time.perf_counter()
        stream = self._openai.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": prompt}],
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"x-paceline-avoid-replica": avoid_replica} if avoid_replica else None,
            extra_body={"speculation": speculation},
        )
        text, ttft_s = "", 0.0
        last: dict[str, Any] = {}
        for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content:
                    ttft_s = ttft_s or time.perf_counter() - started
                    text += choice.delta.content
                    on_text(choice.delta.content)
            if chunk.usage is not None:
                last = chunk.model_dump()
        usage, metrics = last["usage"], last["metrics"]
        return Answer(
            text=text,
            ttft_s=ttft_s,
            duration_s=time.perf_counter() - started,
            num_tokens=usage["completion_tokens"],
            num_cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            replica=metrics["replica"],
            speculation=metrics.get("speculative_decoding") or {},
        )

    def over_grpc(
        self,
        prompt: str,
        *,
        temperature: float,
        seed: int,
        max_tokens: int,
        on_text: Callable[[str], None] = lambda text: None,
    ) -> Answer:
        """Stream the same over gRPC.

        Raises:
            grpc.RpcError: the request failed.
        """
        request = pb.GenerateRequest(
            model=self._model,
            chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content=prompt)]),
            sampling=pb.SamplingOptions(temperature=temperature, seed=seed, max_tokens=max_tokens),
        )
        started = time.perf_counter()
        text, ttft_s = "", 0.0
        last = pb.GenerateChunk()
        for chunk in self._stub.Generate(request, timeout=_TIMEOUT_S, metadata=self._metadata):
            if chunk.text:
                ttft_s = ttft_s or time.perf_counter() - started
                text += chunk.text
                on_text(chunk.text)
            last = chunk
        return Answer(
            text=text,
            ttft_s=ttft_s,
            duration_s=time.perf_counter() - started,
            num_tokens=last.usage.completion_tokens,
            num_cached_tokens=last.usage.cached_tokens,
            replica=last.replica,
            speculation={"num_table_hits": last.speculation.num_table_hits},
        )
