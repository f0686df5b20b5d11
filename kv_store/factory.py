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

logger = logging.getLogger(__name__)


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
        tiers = [
            GuardedTier(
                _sealed(wrap(_build_tier(tier, make_breaker, owned)), tier, config),
                operation_timeout_s=tier.operation_timeout_s,
                make_breaker=make_breaker,
            )
            for tier in config.tiers
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


def _build_tier(
    config: TierConfig, make_breaker: Callable[[], CircuitBreaker], owned: ExitStack
) -> KVTier:
    name = config.name or config.kind
    if isinstance(config, MemoryTierConfig):
        return MemoryTier(config.budget_bytes, name=name)
    if isinstance(config, SsdTierConfig):
        from kv_store.tiers.ssd import SsdTier

        return SsdTier(
            config.root,
            budget_bytes=config.budget_bytes,
            segment_bytes=config.segment_bytes,
            num_read_threads=config.num_read_threads,
            name=name,
        )
    return _build_valkey(config, name, make_breaker, owned)


def _build_valkey(
    config: ValkeyTierConfig | EmbeddedValkeyTierConfig,
    name: str,
    make_breaker: Callable[[], CircuitBreaker],
    owned: ExitStack,
) -> KVTier:
    from kv_store.tiers.valkey import ValkeyTier
    from kv_store.tiers.valkey_topology import ValkeyAddress, valkey_address

    if isinstance(config, EmbeddedValkeyTierConfig):
        from kv_store.tiers.embedded_valkey import EmbeddedValkey

        server = EmbeddedValkey(config.max_memory_bytes)
        server.start()
        owned.callback(server.stop)
        address = ValkeyAddress(url=server.url)
    else:
        address = valkey_address(config)
    return ValkeyTier(
        address,
        ttl_s=config.ttl_s,
        ttl_head_boost=config.ttl_head_boost,
        connect_timeout_s=config.connect_timeout_s,
        operation_timeout_s=config.operation_timeout_s,
        max_connections=config.max_connections,
        find_cuts=section_offsets,
        make_breaker=make_breaker,
        name=name,
    )
