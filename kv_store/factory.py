"""From a configuration to a running store. Heavy imports happen only for what is configured."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kv_store.codecs.registry import load_codec
from kv_store.config import (
    EmbeddedValkeyTierConfig,
    KVStoreConfig,
    MemoryTierConfig,
    PeersTierConfig,
    SsdTierConfig,
    TierConfig,
    ValkeyTierConfig,
)
from kv_store.keys import PageKey
from kv_store.page_format import decode_page, encode_page, section_offsets
from kv_store.store import TieredPageStore
from kv_store.tiers.breaker import CircuitBreaker
from kv_store.tiers.guarded import GuardedTier
from kv_store.tiers.memory import MemoryTier

if TYPE_CHECKING:
    from collections.abc import Callable

    from kv_store.codecs.base import Codec
    from kv_store.layout import PageLayout
    from kv_store.page_store import PageStore
    from kv_store.tiers.base import KVTier
    from kv_store.tiers.ssd import SsdTier
    from kv_store.tiers.valkey_topology import ValkeyAddress

logger = logging.getLogger(__name__)

_MIB = 1 << 20


def build_page_store(
    config: KVStoreConfig,
    layout: PageLayout,
    *,
    wrap_tier: Callable[[KVTier], KVTier] | None = None,
) -> PageStore:
    """Build and start a store; it owns a thread, so close it.

    A server or disk that is out of reach is no error: its breaker opens, and it is used as soon as
    it is back.

    Args:
        config: codec, tiers, bounds.
        layout: of every page.
        wrap_tier: put around each tier before its breaker, such as a ``FaultyTier`` for a drill.

    Raises:
        ValueError: the configured codec does not exist.
        TierUnavailableError: an embedded server does not start.
    """
    codec = load_codec(config.codec)
    _warm_up(codec, layout)
    wrap = wrap_tier or (lambda tier: tier)
    make_breaker = partial(
        CircuitBreaker,
        max_failures=config.breaker.max_failures,
        open_s=config.breaker.open_s,
        max_open_s=config.breaker.max_open_s,
    )
    with ExitStack() as owned:
        builder = _Builder(config, layout, make_breaker, owned)
        tiers = [
            GuardedTier(
                _sealed(wrap(tier), tier_config, config),
                operation_timeout_s=tier_config.operation_timeout_s,
                make_breaker=make_breaker,
            )
            for tier_config, tier in zip(config.tiers, builder.build_all(), strict=True)
        ]
        names = ", ".join(tier.name for tier in tiers)
        logger.info("KV store: codec %s (%s), tiers %s", codec.name, codec.fidelity, names)
        return TieredPageStore(
            config=config,
            layout=layout,
            codec=codec,
            tiers=tiers,
            owned=owned.pop_all(),
        )


def _warm_up(codec: Codec, layout: PageLayout) -> None:
    """Pack and unpack one small page: what the codec compiles, no request has to wait for."""
    small = replace(layout, num_layers=1)
    key = PageKey(bytes(16), bytes(32), 0)
    page = np.zeros(small.nbytes, dtype=np.uint8)
    blob = encode_page(key, page, small, codec, created_ms=0)
    decode_page(blob, key, small, {codec.codec_id: codec}, page)


def _sealed(tier: KVTier, tier_config: TierConfig, config: KVStoreConfig) -> KVTier:
    """The tier, its blobs encrypted if they leave this process and a key is configured."""
    if config.encryption_key is None or isinstance(tier_config, MemoryTierConfig):
        return tier
    from kv_store.tiers.sealed import SealedTier

    secret = bytes.fromhex(config.encryption_key.get_secret_value())
    return SealedTier(tier, secret, num_threads=config.num_codec_threads)


class _Builder:
    """Builds a store's tiers, of which some use others."""

    def __init__(
        self,
        config: KVStoreConfig,
        layout: PageLayout,
        make_breaker: Callable[[], CircuitBreaker],
        owned: ExitStack,
    ) -> None:
        self._config = config
        self._layout = layout
        self._make_breaker = make_breaker
        self._owned = owned
        self._hot_tier: ValkeyAddress | None = None
        self._ssd: SsdTier | None = None
        self._max_reads = 1

    def build_all(self) -> list[KVTier]:
        """In the order configured; the one that uses others is built last."""
        tiers = {
            place: self._build(tier)
            for place, tier in enumerate(self._config.tiers)
            if not isinstance(tier, PeersTierConfig)
        }
        tiers |= {
            place: self._build_peers(tier)
            for place, tier in enumerate(self._config.tiers)
            if isinstance(tier, PeersTierConfig)
        }
        return [tiers[place] for place in range(len(tiers))]

    def _build(
        self,
        config: MemoryTierConfig | ValkeyTierConfig | EmbeddedValkeyTierConfig | SsdTierConfig,
    ) -> KVTier:
        name = config.name or config.kind
        if isinstance(config, MemoryTierConfig):
            return MemoryTier(config.budget_bytes, name=name)
        if isinstance(config, SsdTierConfig):
            return self._build_ssd(config, name)
        return self._build_valkey(config, name)

    def _build_ssd(self, config: SsdTierConfig, name: str) -> KVTier:
        from kv_store.tiers.ssd import SsdTier

        tier = SsdTier(
            config.root,
            budget_bytes=config.budget_bytes,
            segment_bytes=config.segment_bytes,
            num_read_threads=config.num_read_threads,
            name=name,
        )
        if self._ssd is None:
            self._ssd, self._max_reads = tier, config.num_read_threads
        return tier

    def _build_valkey(
        self, config: ValkeyTierConfig | EmbeddedValkeyTierConfig, name: str
    ) -> KVTier:
        from kv_store.tiers.valkey import ValkeyTier
        from kv_store.tiers.valkey_topology import ValkeyAddress, valkey_address

        if isinstance(config, EmbeddedValkeyTierConfig):
            from kv_store.tiers.embedded_valkey import EmbeddedValkey

            server = EmbeddedValkey(config.max_memory_bytes)
            server.start()
            self._owned.callback(server.stop)
            address = ValkeyAddress(url=server.url)
        else:
            address = valkey_address(config)
        self._hot_tier = self._hot_tier or address
        return ValkeyTier(
            address,
            ttl_s=config.ttl_s,
            ttl_head_boost=config.ttl_head_boost,
            tenant_quota_bytes=config.tenant_quota_bytes,
            connect_timeout_s=config.connect_timeout_s,
            operation_timeout_s=config.operation_timeout_s,
            max_connections=config.max_connections,
            find_cuts=section_offsets,
            make_breaker=self._make_breaker,
            name=name,
        )

    def _build_peers(self, config: PeersTierConfig) -> KVTier:
        from kv_store.tiers.page_directory import PageDirectory
        from kv_store.tiers.peers import PagePublisher, PeerTier

        if self._hot_tier is None:
            raise ValueError("a tier of kind peers finds pages through a Valkey tier")
        directory = PageDirectory(
            self._hot_tier,
            connect_timeout_s=config.connect_timeout_s,
            operation_timeout_s=config.operation_timeout_s / 2,  # the rest is for the pages
        )
        publisher = None
        if self._ssd is not None:
            publisher = PagePublisher(
                config,
                directory,
                hot_tier=self._hot_tier,
                ssd=self._ssd,
                max_reads=self._max_reads,
            )
        return PeerTier(
            config,
            directory,
            max_page_bytes=2 * self._layout.nbytes + _MIB,  # no codec needs so much
            make_breaker=self._make_breaker,
            publisher=publisher,
            name=config.name or config.kind,
        )
