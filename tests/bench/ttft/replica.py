"""A target replica's engine with a page store, its tiers' servers, and another such replica.

An engine lives for one measurement, so that nothing of an earlier one is left in its page pool.
What a long-lived replica has done before its first request is done first here too: folders are
open, servers connected, and the pool's memory is the process's.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.config import TorchEngineConfig
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.assembly import EngineParts, start_engine
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.weights.loader import default_cache_dir, load_model
from deployments.engine.types import GenerationRequest, SamplingParams
from kv_store import KVStoreConfig, build_page_store
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence
    from multiprocessing.connection import Connection

    from deployments.engine.torch_engine.weights.loader import LoadedModel

MODEL = "smollm2-135m-instruct"
TAIL_TOKENS = 9
"""Behind the last full page: no engine can answer without computing something."""
LOAD_TIMEOUT_S = 30.0
PATIENT_S = 600.0

_numbers = itertools.count(1)


class Answer(NamedTuple):
    """One request's.

    Attributes:
        ttft_s: from the request to its first token.
        num_tier_tokens: of the prompt, that came from the tier.
    """

    ttft_s: float
    num_tier_tokens: int


def load_weights() -> LoadedModel:
    """The default model, in float32."""
    return load_model(MODEL, dtype="float32", cache_dir=default_cache_dir())


def make_prompt(num_tokens: int, seed: int) -> tuple[int, ...]:
    """Tokens of whole pages, and a few more; no two seeds share a page."""
    length = num_tokens // PAGE_TOKENS * PAGE_TOKENS + TAIL_TOKENS
    rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
    return tuple(rng.randrange(300, 40_000) for _ in range(length))


def make_request(
    prompt: Sequence[int], *, max_tokens: int = 1, tenant_key: bytes = bytes(32)
) -> GenerationRequest:
    """A greedy one."""
    return GenerationRequest(
        request_id=f"bench-{next(_numbers)}",
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, seed=1, temperature=0.0, ignore_eos=True),
        tenant_key=tenant_key,
    )


class Replica:
    """An engine and a store; an async context manager."""

    def __init__(
        self, loaded: LoadedModel, tiers: KVStoreConfig | None, num_threads: int, num_pages: int
    ) -> None:
        """Start.

        Args:
            loaded: the weights, shared by all replicas of a process.
            tiers: None for a replica without any.
            num_threads: of the engine.
            num_pages: of its pool.
        """
        config = TorchEngineConfig(
            num_threads=num_threads,
            num_pages=num_pages,
            max_model_len=loaded.config.max_positions,
            kv_load_timeout_s=LOAD_TIMEOUT_S,
        )
        self.store = build_page_store(tiers, loaded.page_layout()) if tiers else None
        memory = KVCache(loaded.config, num_pages, dtype=loaded.model.dtype)
        memory.k.zero_()
        memory.v.zero_()
        self.engine = start_engine(
            config,
            EngineParts(
                runner=ModelRunner(loaded.model, loaded.config, memory),
                memory=memory,
                layout=loaded.page_layout(),
                vocab_size=loaded.config.vocab_size,
                max_positions=loaded.config.max_positions,
                eos_token_ids=frozenset(loaded.config.eos_token_ids),
                store=self.store,
                speculator=NoSpeculation(),
                detokenize=lambda token_ids: "",
            ),
        )

    async def __aenter__(self) -> Replica:
        await self.answer(make_prompt(2 * PAGE_TOKENS, 1_000_000 + next(_numbers)))
        self.flush()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.engine.close()
        if self.store is not None:
            self.store.close()

    async def answer(self, prompt: Sequence[int]) -> Answer:
        """The first token."""
        began = time.monotonic()
        ttft_s = num_tier_tokens = 0.0
        async for delta in self.engine.generate(make_request(prompt)):
            ttft_s = ttft_s or time.monotonic() - began
            if delta.usage is not None:
                num_tier_tokens = delta.usage.num_tier_cached_tokens
        return Answer(ttft_s, int(num_tier_tokens))

    async def tokens(self, prompt: Sequence[int], max_tokens: int) -> AsyncIterator[int]:
        """How many came, each time."""
        async for delta in self.engine.generate(make_request(prompt, max_tokens=max_tokens)):
            yield len(delta.token_ids)

    def flush(self) -> None:
        """Wait for all writes."""
        if self.store is not None and not self.store.flush(PATIENT_S):
            raise TimeoutError("pages were not written in time")


class OtherNode:
    """A replica in a process of its own, which has computed prompts and holds their pages."""

    def __init__(self, connection: Connection, process: multiprocessing.process.BaseProcess):
        self._connection = connection
        self._process = process

    def compute(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prefill prompts and write their pages to all tiers; returns once they are there."""
        self._connection.send([tuple(prompt) for prompt in prompts])
        if not self._connection.poll(PATIENT_S):
            raise TimeoutError("the other node did not answer")
        self._connection.recv()


@contextmanager
def other_node(tiers: KVStoreConfig, num_threads: int, num_pages: int) -> Iterator[OtherNode]:
    """Start one; it serves the pages of its folder until the context ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_live, args=(theirs, tiers, num_threads, num_pages))
    process.start()
    theirs.close()
    try:
        yield OtherNode(ours, process)
    finally:
        ours.close()
        process.join(30)
        process.kill()


def _live(connection: Connection, tiers: KVStoreConfig, num_threads: int, num_pages: int) -> None:
    """The other node's process; ends with the connection."""
    import asyncio

    async def live() -> None:
        async with Replica(load_weights(), tiers, num_threads, num_pages) as replica:
            while True:
                try:
                    prompts = await asyncio.to_thread(connection.recv)
                except EOFError:
                    return
                for prompt in prompts:
                    await replica.answer(prompt)
                    replica.flush()
                connection.send("done")

    asyncio.run(live())
