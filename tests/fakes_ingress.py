"""A whole ingress over an engine of the same process, without a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx

from deployments.config import AuthConfig, IngressConfig, TracingConfig
from deployments.engine.config import TorchEngineConfig
from deployments.ingress import IngressReplica
from tests.fakes_echo_engine import EchoEngine
from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from deployments.engine.types import GenerationRequest, TokenDelta


class Replica(IngressReplica):
    """An ingress that tests shut down themselves."""

    def __del__(self) -> None:
        """Not when it is collected: the hook is a coroutine."""


class Handle:
    """The handle of a target deployment whose replica is an engine of this process."""

    def __init__(self) -> None:
        self.engine: EchoEngine

    def options(self, **_: object) -> Handle:
        return self

    def remote(self, request: GenerationRequest) -> Stream:
        return Stream(self.engine.generate(request))


class Stream:
    """What a streaming call of a handle returns."""

    def __init__(self, deltas: AsyncIterator[TokenDelta]) -> None:
        self._deltas = deltas

    async def __aiter__(self) -> AsyncIterator[tuple[TokenDelta, ...]]:
        async for delta in self._deltas:
            yield (delta,)

    def cancel(self) -> None:
        """Nobody else runs here."""


def echo_ingress(
    folder: Path,
    *,
    alphabet: str = "ab",
    config: IngressConfig | None = None,
    auth: AuthConfig | None = None,
    tracing: TracingConfig | None = None,
) -> Replica:
    """An ingress to a model ``m`` that writes the tokens of ``alphabet``."""
    handle = Handle()
    model = str(write_tokenizer(folder / "model"))
    replica = Replica(
        handle,
        engine=TorchEngineConfig(model=model, served_model_name="m"),
        cache_dir=folder,
        config=config or IngressConfig(),
        auth=auth or AuthConfig(),
        tracing=tracing or TracingConfig(),
    )
    tokenizer = replica._tokenizer
    handle.engine = EchoEngine(vocabulary=tokenizer.encode(alphabet), decode=tokenizer.decode)
    return replica


def http_client(replica: IngressReplica) -> httpx.AsyncClient:
    """A client of its HTTP surface; a stream comes whole."""
    transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
    return httpx.AsyncClient(transport=transport, base_url="http://ingress")
