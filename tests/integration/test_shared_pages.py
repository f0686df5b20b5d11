"""Pages written by one replica serve another; damaged ones never do (real weights and tiers)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import redis
from pydantic import SecretStr

from deployments.engine.config import TorchEngineConfig
from deployments.engine.speculation.speculator import NoSpeculation
from deployments.engine.torch_engine.assembly import EngineParts, start_engine
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir, load_model
from deployments.engine.types import GenerationRequest, SamplingParams
from kv_store import (
    KVStoreConfig,
    PeersTierConfig,
    SsdTierConfig,
    ValkeyTierConfig,
    build_page_store,
)
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.valkey_admin import stored_pages
from tests.kv_pages import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kv_store.config import TierConfig

pytestmark = pytest.mark.integration

MIB = 1 << 20
NUM_PAGES = 3
CONFIG = TorchEngineConfig(dtype="float32", num_threads=2, num_pages=16, kv_load_timeout_s=20)


@pytest.fixture(scope="module")
def loaded():
    prepare_builtin(default_cache_dir(), print)
    return load_model("smollm2-135m-instruct", dtype="float32", cache_dir=default_cache_dir())


@pytest.fixture
def valkey():
    server = EmbeddedValkey(64 * MIB)
    server.start()
    yield server
    server.stop()


class Replica:
    """An engine with a page store of its own, mostly for the length of one request."""

    def __init__(self, loaded, *tiers: TierConfig, codec: str = "raw") -> None:
        config = KVStoreConfig(codec=codec, tiers=tiers)
        self._store = build_page_store(config, loaded.page_layout())
        memory = KVCache(loaded.config, CONFIG.num_pages, dtype=loaded.model.dtype)
        self._engine = start_engine(
            CONFIG,
            EngineParts(
                runner=ModelRunner(loaded.model, loaded.config, memory),
                memory=memory,
                layout=loaded.page_layout(),
                vocab_size=loaded.config.vocab_size,
                max_positions=loaded.config.max_positions,
                eos_token_ids=frozenset(loaded.config.eos_token_ids),
                store=self._store,
                speculator=NoSpeculation(),
                detokenize=lambda token_ids: "",
            ),
        )

    async def answer(
        self, *, tenant_key: bytes = bytes(32), is_last: bool = True
    ) -> tuple[list[int], int, int]:
        """Output, prompt tokens that came from the tier, corrupt pages seen."""
        request = GenerationRequest(
            request_id="r",
            prompt_token_ids=tuple(300 + (i * 7919) % 20_000 for i in range(NUM_PAGES * 64 + 9)),
            sampling=SamplingParams(max_tokens=12, seed=3, temperature=1.0, ignore_eos=True),
            tenant_key=tenant_key,
        )
        output: list[int] = []
        num_from_tier = -1
        async for delta in self._engine.generate(request):
            output.extend(delta.token_ids)
            if delta.usage is not None:
                num_from_tier = delta.usage.num_tier_cached_tokens
        assert self._store.flush(20)
        num_corrupt = sum(tier.num_corrupt for tier in self._store.stats().tiers.values())
        if is_last:
            await self.close()
        return output, num_from_tier, num_corrupt

    async def close(self) -> None:
        await self._engine.close()


def damage_valkey(client: redis.Redis) -> None:
    for key in client.scan_iter():
        blob = bytearray(client.get(key))
        blob[len(blob) // 2] ^= 1
        client.set(key, bytes(blob))


def damage_files(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file() and path.stat().st_size > MIB:
            content = bytearray(path.read_bytes())
            # Records are larger than this stride, so each of them is hit at least once.
            for at in range(MIB // 2, len(content), MIB):
                content[at] ^= 1
            path.write_bytes(content)


async def check(loaded, tier: TierConfig, damage: Callable[[], None]) -> None:
    text, from_tier, _ = await Replica(loaded, tier).answer()
    assert from_tier == 0
    assert await Replica(loaded, tier).answer() == (text, NUM_PAGES * 64, 0)
    stranger, from_tier, _ = await Replica(loaded, tier).answer(tenant_key=bytes([1]) * 32)
    assert (stranger, from_tier) == (text, 0), "another tenant computes the same text itself"
    damage()
    damaged, from_tier, num_corrupt = await Replica(loaded, tier).answer()
    assert damaged == text
    assert from_tier == 0
    assert num_corrupt > 0
    assert await Replica(loaded, tier).answer() == (text, NUM_PAGES * 64, 0), "written anew"


async def test_valkey(loaded, valkey):
    tier = ValkeyTierConfig(url=SecretStr(valkey.url), operation_timeout_s=10)
    with redis.Redis.from_url(valkey.url) as client:
        await check(loaded, tier, lambda: damage_valkey(client))


async def test_ssd(loaded, tmp_path):
    tier = SsdTierConfig(
        root=tmp_path, budget_bytes=64 * MIB, segment_bytes=16 * MIB, operation_timeout_s=10
    )
    await check(loaded, tier, lambda: damage_files(tmp_path))


async def test_another_nodes_folder(loaded, valkey, tmp_path):
    hot = ValkeyTierConfig(url=SecretStr(valkey.url), operation_timeout_s=10)
    others = PeersTierConfig(connect_timeout_s=5, operation_timeout_s=15)

    def node(name: str) -> Replica:
        folder = SsdTierConfig(root=tmp_path / name, budget_bytes=64 * MIB, segment_bytes=16 * MIB)
        return Replica(loaded, hot, folder, others)

    owner = node("a")
    text, from_tier, _ = await owner.answer(is_last=False)
    assert from_tier == 0
    with redis.Redis.from_url(valkey.url) as client:
        num_pages = len(stored_pages(client))
        assert num_pages >= NUM_PAGES
        wait_until(lambda: len(list(client.scan_iter(match="*:at"))) == num_pages, 60)
        client.unlink(*stored_pages(client))
    assert await node("b").answer() == (text, NUM_PAGES * 64, 0)
    await owner.close()


async def test_an_exact_reader_never_gets_a_lossy_page(loaded, valkey):
    tier = ValkeyTierConfig(url=SecretStr(valkey.url), operation_timeout_s=10)
    text, _, _ = await Replica(loaded, tier, codec="int8").answer()
    lossy, from_tier, _ = await Replica(loaded, tier, codec="int8").answer()
    assert from_tier == NUM_PAGES * 64
    assert len(lossy) == len(text)
    exact, from_tier, _ = await Replica(loaded, tier, codec="raw").answer()
    assert (exact, from_tier) == (text, 0)
