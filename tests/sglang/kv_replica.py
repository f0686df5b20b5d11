"""A replica's engine without a cluster: SGLang behind the engine seam, told what to do by lines.

    SGLANG_PYTHON -m tests.sglang.kv_replica SETTINGS

Reads one JSON object a line and answers each with one. ``test_kv_tier`` starts it, in SGLang's
environment.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from array import array
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from deployments.engine.config import EngineConfig
from deployments.engine.errors import EngineSetupError
from deployments.engine.factory import build_engine
from deployments.engine.sglang_engine.draft_link import DraftLink, DraftSettings
from deployments.engine.speculation.draft_server import DraftServer
from deployments.engine.speculation.drafters.suffix import SuffixDrafter
from deployments.engine.speculation.handshake import Identity
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.engine.types import GenerationRequest, SamplingParams
from kv_store.config import KVStoreConfig

if TYPE_CHECKING:
    from deployments.engine.sglang_engine.engine import SGLangEngine


class Drafts:
    """A draft server in this process, and the link that tells SGLang's scheduler of it."""

    def __init__(self, config: EngineConfig) -> None:
        identity = Identity(model="m", vocab_size=49152, vocab_digest="")
        secret = SecretStr("a shared secret")
        self._server = DraftServer(SuffixDrafter(), identity, secret)
        self._endpoint = f"127.0.0.1:{self._server.start()}"
        settings = DraftSettings(config.speculation, identity, "r", secret)
        self.link = DraftLink(settings, lambda _: None)

    def attach(self, request_id: str) -> None:
        self.link.attach(request_id, self._endpoint)

    def close(self) -> None:
        self._server.close()


def open_engine(settings: dict[str, Any], drafts: Drafts | None) -> SGLangEngine:
    """Blocks until the model is loaded."""
    engine: Any = build_engine(
        EngineConfig.model_validate(settings["engine"]),
        cache_dir=default_cache_dir(),
        page_store_factory=None,
        speculator=NoSpeculation() if drafts is None else drafts.link,
        detokenize=lambda _: "",
        kv=KVStoreConfig.model_validate(settings["kv"]),
    )
    return engine


async def ask(
    engine: SGLangEngine, number: int, asked: dict[str, Any], drafts: Drafts | None
) -> dict[str, Any]:
    """Tokens of an output, how many of the prompt's were cached where, and of drafts accepted."""
    request = GenerationRequest(
        request_id=f"r{number}",
        prompt_token_ids=tuple(asked["prompt"]),
        sampling=SamplingParams(**{"seed": 0, "temperature": 0.0} | asked["sampling"]),
        tenant=f"tenant-{asked['tenant']}",
        tenant_key=bytes([asked["tenant"]]) * 32,
        speculation=asked["is_drafted"],
    )
    if drafts is not None and asked["is_drafted"]:
        drafts.attach(request.request_id)
    token_ids: list[int] = []
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            token_ids += delta.token_ids
            usage, speculation = delta.usage, delta.speculation
    if drafts is not None:
        drafts.link.detach(request.request_id)
    assert usage is not None
    assert speculation is not None
    return {
        "num_accepted_pool": speculation.num_accepted_pool_tokens,
        "token_ids": token_ids,
        "num_cached": usage.num_cached_tokens,
        "num_tier_cached": usage.num_tier_cached_tokens,
    }


def page_name(extra_key: str | None, cache_salt: str | None) -> str:
    """SGLang's name of a page that begins a prompt."""
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    key = RadixKey(array("q", range(64)), extra_key=extra_key, cache_salt=cache_salt)
    (name,) = get_storage_hash_str(key, None, page_size=64)
    return str(name)


async def obey(
    engine: SGLangEngine, number: int, line: dict[str, Any], drafts: Drafts | None
) -> Any:
    """Do one thing."""
    runtime: Any = engine._runtime
    match line["do"]:
        case "ask":
            return await ask(engine, number, line, drafts)
        case "flush":  # SGLang's own memories: the GPU's pages and the host's
            return (await runtime._manager.flush_cache()).success
        case "clear":
            return (await runtime._manager.clear_hicache_storage()).success
        case "attach" | "detach":
            try:
                await getattr(runtime, f"{line['do']}_tier")()
            except EngineSetupError:
                return False
            return True
        case "name":
            return page_name(line["extra_key"], line["cache_salt"])
        case "held":
            return engine.held_prefixes()
        case "stats":
            return asdict(engine.page_store_stats())
    raise ValueError(line)


async def main(settings: dict[str, Any]) -> None:
    """Serve until the input ends."""
    # Whatever SGLang prints does not mix with the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    drafts = None
    if settings.get("is_drafted"):
        drafts = Drafts(EngineConfig.model_validate(settings["engine"]))
    engine = open_engine(settings, drafts)
    try:
        print(json.dumps("ready"), file=answers)
        number = 0
        while line := await asyncio.to_thread(sys.stdin.readline):
            number += 1
            answer = await obey(engine, number, json.loads(line), drafts)
            print(json.dumps(answer), file=answers)
    finally:
        await engine.close()
        if drafts is not None:
            drafts.close()


if __name__ == "__main__":
    asyncio.run(main(json.loads(Path(sys.argv[1]).read_text())))
