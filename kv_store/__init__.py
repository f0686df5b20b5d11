"""One KV page from an engine's buffer to another replica."""

from kv_store.config import (
    BreakerConfig,
    EmbeddedValkeyTierConfig,
    KVStoreConfig,
    MemoryTierConfig,
    MovesConfig,
    PeersTierConfig,
    SingleFlightConfig,
    SsdTierConfig,
    TierConfig,
    ValkeyTierConfig,
    WriteBackConfig,
)
from kv_store.errors import (
    CodecLossError,
    KVStoreError,
    LayoutMismatchError,
    PageCorruptError,
    PageUnsupportedError,
    TierUnavailableError,
)
from kv_store.factory import build_page_store
from kv_store.keys import EXACT, Namespace, PageKey
from kv_store.landing import Landing
from kv_store.layout import PAGE_TOKENS, PageLayout
from kv_store.page_store import LoadedPages, PageStore, PageStoreStats, TierStats

__all__ = [
    "EXACT",
    "PAGE_TOKENS",
    "BreakerConfig",
    "CodecLossError",
    "EmbeddedValkeyTierConfig",
    "KVStoreConfig",
    "KVStoreError",
    "Landing",
    "LayoutMismatchError",
    "LoadedPages",
    "MemoryTierConfig",
    "MovesConfig",
    "Namespace",
    "PageCorruptError",
    "PageKey",
    "PageLayout",
    "PageStore",
    "PageStoreStats",
    "PageUnsupportedError",
    "PeersTierConfig",
    "SingleFlightConfig",
    "SsdTierConfig",
    "TierConfig",
    "TierStats",
    "TierUnavailableError",
    "ValkeyTierConfig",
    "WriteBackConfig",
    "build_page_store",
]
