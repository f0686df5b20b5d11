"""Time to the first token by prompt length, share of hits, and where the pages come from."""

from __future__ import annotations

import asyncio
import shutil
import sys
from statistics import median
from typing import TYPE_CHECKING, Any

import redis

from kv_store import (
    KVStoreConfig,
    PeersTierConfig,
    SsdTierConfig,
    ValkeyTierConfig,
)
from kv_store.layout import PAGE_TOKENS
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.valkey_admin import stored_pages
from tests.bench.ttft.replica import PATIENT_S, Replica, make_prompt, other_node
from tests.kv_pages import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from deployments.engine.torch_engine.weights.loader import LoadedModel
    from tests.bench.ttft.replica import Answer

SOURCES = ("valkey", "ssd", "peers")
HITS = (0.0, 0.5, 0.8, 1.0)
CODEC = "int8"
_MAX_MEMORY_BYTES = 2 << 30
_BUDGET_BYTES = 4 << 30
_POOL_PAGES = 144


class Stage:
    """Two nodes and a Valkey server; the other node has computed the prompts.

    Attributes:
        valkey_url: of the server.
        tiers: of this node's replicas, by the tier that pages shall come from.
    """

    def __init__(self, folder: Path, prompts: list[tuple[int, ...]], num_threads: int) -> None:
        """Prepare; nothing runs yet.

        Args:
            folder: for the folders of both nodes.
            prompts: for the other node.
            num_threads: of each engine; one works at a time.
        """
        self._folder = folder
        self._prompts = prompts
        self._num_threads = num_threads
        self._server = EmbeddedValkey(_MAX_MEMORY_BYTES)

    def run(self, act: Callable[[Stage], None]) -> None:
        """Set up, act, tear down."""
        self._server.start()
        try:
            self.valkey_url = self._server.url
            valkey = ValkeyTierConfig(url=self._server.url, operation_timeout_s=10.0, ttl_s=36_000)
            peers = PeersTierConfig(operation_timeout_s=10.0)
            theirs = self._ssd("theirs")
            self.tiers = {
                "valkey": _store(valkey),
                "ssd": _store(self._ssd("ours")),
                "peers": _store(valkey, self._ssd("empty"), peers),
            }
            with other_node(_store(valkey, theirs, peers), self._num_threads, _POOL_PAGES) as node:
                node.compute(self._prompts)
                shutil.copytree(self._folder / "theirs", self._folder / "ours")
                num_pages = sum(len(prompt) // PAGE_TOKENS for prompt in self._prompts)
                with redis.Redis.from_url(self.valkey_url) as self._admin:
                    wait_until(lambda: self._num_records() >= num_pages, PATIENT_S)
                    self._kept = set(stored_pages(self._admin))
                    act(self)
        finally:
            self._server.stop()

    def forget_later_pages(self) -> None:
        """Of Valkey, what measurements have written; it shall not fill up."""
        self._unlink(set(stored_pages(self._admin)) - self._kept)

    def forget_valkey_pages(self) -> None:
        """All pages of Valkey; where other nodes have them stays known."""
        self._kept = set()
        self.forget_later_pages()

    def _unlink(self, names: set[bytes]) -> None:
        if names:
            self._admin.unlink(*names)

    def _num_records(self) -> int:
        return sum(name.endswith(b":at") for name in self._admin.scan_iter(match="kv:{*"))

    def _ssd(self, name: str) -> SsdTierConfig:
        return SsdTierConfig(
            root=self._folder / name, budget_bytes=_BUDGET_BYTES, operation_timeout_s=30.0
        )


class TtftRuns:
    """Fresh replicas that answer one prompt each, cold and from a tier."""

    def __init__(self, stage: Stage, loaded: LoadedModel, num_threads: int) -> None:
        """Prepare.

        Args:
            stage: set up; after ``measure`` its Valkey holds no pages any more.
            loaded: the weights.
            num_threads: of the engine.
        """
        self._stage = stage
        self._loaded = loaded
        self._num_threads = num_threads
        self._seeds = iter(range(100_000, 1_000_000))

    def measure(self, prompts: dict[int, tuple[int, ...]], rounds: int) -> list[dict[str, Any]]:
        """Rows of the report.

        Args:
            prompts: what the other node has computed, by length.
            rounds: of each measurement.
        """
        rows: list[dict[str, Any]] = []
        for sources in (("valkey", "ssd"), ("peers",)):
            if sources == ("peers",):
                self._stage.forget_valkey_pages()
            for length, prompt in prompts.items():
                rows += self._of_length(length, prompt, sources, rounds)
        return rows

    def _of_length(
        self, length: int, prompt: tuple[int, ...], sources: tuple[str, ...], rounds: int
    ) -> list[dict[str, Any]]:
        cold: list[float] = []
        warm: dict[tuple[str, float], list[float]] = {}
        overheads: dict[str, list[float]] = {source: [] for source in sources}
        for number in range(rounds):
            sys.stderr.write(f"{length} tokens, round {number + 1} of {rounds}\n")
            for source, hits in _cases(sources):
                samples = warm.setdefault((source, hits), [])
                if hits > 0:
                    samples.append(self._warm(prompt, source, hits))
                    continue
                # In pairs, in turns: the difference that is looked for is small.
                if number % 2:
                    samples.append(self._warm(prompt, source, hits))
                cold.append(self._cold(length))
                if not number % 2:
                    samples.append(self._warm(prompt, source, hits))
                overheads[source].append(samples[-1] / cold[-1])
        usual = median(cold)
        return [
            {
                "source": source,
                "tokens": length,
                "hits": hits,
                "ttft_s": median(samples),
                "cold_ttft_s": usual,
                "of_cold": median(samples) / usual if hits else median(overheads[source]),
                "samples_s": samples,
                "cold_samples_s": cold,
            }
            for (source, hits), samples in warm.items()
        ]

    def _warm(self, prompt: tuple[int, ...], source: str, hits: float) -> float:
        mixed = _mix(prompt, hits, next(self._seeds))
        expected = _num_hit_pages(prompt, hits) * PAGE_TOKENS
        seconds = self._ttft(self._stage.tiers[source], mixed, expected)
        self._stage.forget_later_pages()
        return seconds

    def _cold(self, length: int) -> float:
        return self._ttft(None, make_prompt(length, next(self._seeds)), 0)

    def _ttft(self, tiers: KVStoreConfig | None, prompt: tuple[int, ...], expected: int) -> float:
        """Of a fresh replica.

        Raises:
            RuntimeError: another number of tokens than ``expected`` came from a tier.
        """

        async def ask() -> Answer:
            async with Replica(self._loaded, tiers, self._num_threads, _POOL_PAGES) as replica:
                answer = await replica.answer(prompt)
                replica.flush()
                return answer

        answer = asyncio.run(ask())
        if answer.num_tier_tokens != expected:
            raise RuntimeError(f"{answer.num_tier_tokens} tokens came from a tier, not {expected}")
        return answer.ttft_s


def _cases(sources: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    return ((source, hits) for hits in HITS for source in sources)


def _num_hit_pages(prompt: tuple[int, ...], hits: float) -> int:
    return round(len(prompt) // PAGE_TOKENS * hits)


def _mix(prompt: tuple[int, ...], hits: float, seed: int) -> tuple[int, ...]:
    """The beginning of a known prompt, and then something new; all of it known for 1."""
    if hits == 1.0:
        return prompt
    num_known = _num_hit_pages(prompt, hits) * PAGE_TOKENS
    return prompt[:num_known] + make_prompt(len(prompt), seed)[num_known : len(prompt)]


def _store(*tiers: Any) -> KVStoreConfig:
    return KVStoreConfig(codec=CODEC, tiers=tiers, moves=None)
