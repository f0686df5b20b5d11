"""The storage backend that SGLang's hierarchical cache loads: its host memory over the KV tier.

SGLang constructs it in the scheduler of every rank (``hicache_storage_backend="dynamic"``) and
calls it from its own threads: one asks for pages, one loads, one saves. An exception or a None
would end such a thread for the life of the process, so whatever goes wrong is logged and a miss.
"""

from __future__ import annotations

import logging
import time
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult
from sglang.srt.observability.metrics_collector import StorageMetrics

from deployments.engine.sglang_engine.host_pages import HostPages, host_page_layout
from deployments.engine.sglang_engine.page_owners import current_traceparent
from deployments.engine.sglang_engine.shared_pages import SharedPages, without_positions
from deployments.engine.sglang_engine.tier_link import StatsWriter, folder_of, read_settings
from kv_store.factory import build_page_store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from deployments.engine.sglang_engine.host_pages import HostPool

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound="Callable[..., Any]")

_MAX_SAMPLES = 4096
"""Of SGLang's metrics, kept until it asks for them."""


def _never_raises(miss: Callable[..., Any]) -> Callable[[Method], Method]:
    """Make a method answer what ``miss`` makes of its arguments where it would raise."""

    def decorate(method: Method) -> Method:
        @wraps(method)
        def guarded(self: PacelineStorage, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            try:
                return method(self, *args, **kwargs)
            except Exception:
                logger.exception("the KV tier failed at %s", method.__name__)
                return miss(*args, **kwargs)

        return cast("Method", guarded)

    return decorate


class PacelineStorage(HiCacheStorage):  # type: ignore[misc] # SGLang is not typed here
    """SGLang's names for what ``SharedPages`` does."""

    def __init__(self, storage_config: Any, _: object = None) -> None:  # noqa: ANN401
        """Read what the replica offers.

        Args:
            storage_config: SGLang's ``HiCacheStorageConfig``.

        Raises:
            OSError: the replica offers nothing.
            ValueError: likewise, or pages of this model cannot be shared.
        """
        if storage_config.is_mla_model:
            raise ValueError(
                "pages of a model with latent attention cannot be shared: set kv: null"
            )
        self._config = storage_config
        self._folder = folder_of(storage_config.extra_config)
        self._settings = read_settings(self._folder)
        self._pages: SharedPages | None = None
        self._host: HostPages | None = None
        self._stats_writer: StatsWriter | None = None
        self._metrics = StorageMetrics()

    def register_mem_pool_host(self, mem_pool_host: HostPool) -> None:
        """Open the tier, now that the layout of the pages is known.

        Raises:
            LayoutMismatchError: pages of this pool cannot be shared.
            TierUnavailableError: an embedded server does not start.
        """
        super().register_mem_pool_host(mem_pool_host)
        config = self._config
        layout = host_page_layout(
            mem_pool_host,
            model_digest=self._settings.model_digest,
            rope="config.json",  # the digest covers it
            engine=(
                f"sglang {self._settings.arithmetic} pp {config.pp_rank}/{config.pp_size} "
                f"cp {config.attn_cp_rank}/{config.attn_cp_size}"
            ),
            tp_rank=config.tp_rank,
            tp_size=config.tp_size,
        )
        kv = without_positions(self._settings.kv)
        store = build_page_store(kv, layout)
        self._pages = SharedPages(
            store,
            layout,
            load_timeout_s=self._settings.load_timeout_s,
            max_queued_pages=min(kv.write_back.max_pages, kv.write_back.max_bytes // layout.nbytes),
        )
        self._host = HostPages(mem_pool_host)
        self._stats_writer = StatsWriter(self._folder, store.stats)

    @_never_raises(lambda *_, **__: 0)
    def batch_exists(self, keys: list[str], extra_info: object = None) -> int:
        """How many pages at the head of a chain are there."""
        del extra_info
        return self._shared.num_held(keys)

    @_never_raises(lambda keys, *_, **__: [False] * len(keys))
    def batch_get_v1(
        self, keys: list[str], host_indices: Tensor, extra_info: object = None
    ) -> list[bool]:
        """Load pages into the host pool."""
        del extra_info
        began = time.monotonic()
        pages = self._memory.at(host_indices, len(keys))
        loaded = self._shared.load(keys, pages, traceparent=current_traceparent())
        self._sample(self._metrics.prefetch_pgs, self._metrics.prefetch_bandwidth, loaded, began)
        return loaded

    @_never_raises(lambda keys, *_, **__: [False] * len(keys))
    def batch_set_v1(
        self, keys: list[str], host_indices: Tensor, extra_info: object = None
    ) -> list[bool]:
        """Queue pages of the host pool for the tier."""
        del extra_info
        began = time.monotonic()
        taken = self._shared.save(keys, self._memory.at(host_indices, len(keys)))
        self._sample(self._metrics.backup_pgs, self._metrics.backup_bandwidth, taken, began)
        return taken

    def exists(self, key: str) -> bool:
        """Whether one page is there."""
        return self.batch_exists([key]) == 1

    @_never_raises(lambda *_, **__: None)
    def get(
        self, key: str, target_location: object = None, target_sizes: object = None
    ) -> Tensor | None:
        """One page, flat as the pool has it, or None."""
        del target_location, target_sizes
        flat, page = self._memory.blank()
        return flat if self._shared.load([key], [page]) == [True] else None

    def batch_get(
        self, keys: list[str], target_locations: object = None, target_sizes: object = None
    ) -> list[Tensor | None]:
        """Pages one by one; SGLang asks so only without ``interface_v1``."""
        del target_locations, target_sizes
        return [self.get(key) for key in keys]

    @_never_raises(lambda *_, **__: False)
    def set(
        self,
        key: str,
        value: Tensor | None = None,
        target_location: object = None,
        target_sizes: object = None,
    ) -> bool:
        """Queue one page, flat as the pool has it."""
        del target_location, target_sizes
        return value is not None and self._shared.save([key], [self._memory.wrap(value)]) == [True]

    def batch_set(
        self,
        keys: list[str],
        values: Sequence[Tensor] | None = None,
        target_locations: object = None,
        target_sizes: object = None,
    ) -> bool:
        """Queue pages one by one."""
        del target_locations, target_sizes
        taken = [self.set(key, value) for key, value in zip(keys, values or (), strict=False)]
        return len(taken) == len(keys) and all(taken)

    # Of other pools than keys and values nothing is stored, so whoever needs them finds nothing.

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: object = None, extra_info: object = None
    ) -> Any:  # noqa: ANN401
        """Nothing."""
        del keys, pool_transfers, extra_info
        return PoolTransferResult.empty()

    def batch_get_v2(
        self, transfers: Sequence[Any], extra_info: object = None
    ) -> dict[str, list[bool]]:
        """Nothing."""
        del extra_info
        return {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}

    def batch_set_v2(
        self, transfers: Sequence[Any], extra_info: object = None
    ) -> dict[str, list[bool]]:
        """Nothing."""
        return self.batch_get_v2(transfers, extra_info)

    @_never_raises(lambda: None)
    def clear(self) -> None:
        """Forget all pages of this model and rank, those of other replicas included."""
        logger.info("%d pages were cleared from the KV tier", self._shared.clear())

    def get_stats(self) -> StorageMetrics:
        """What SGLang's own metrics count, since it was asked last."""
        metrics, self._metrics = self._metrics, StorageMetrics()
        return metrics

    @_never_raises(lambda: None)
    def close(self) -> None:
        """Close the tier. Idempotent."""
        if self._pages is not None:
            self._pages.close()
        if self._stats_writer is not None:
            self._stats_writer.close()

    @property
    def _shared(self) -> SharedPages:
        if self._pages is None:
            raise RuntimeError("SGLang has registered no host pool")
        return self._pages

    @property
    def _memory(self) -> HostPages:
        if self._host is None:
            raise RuntimeError("SGLang has registered no host pool")
        return self._host

    def _sample(
        self, pages: list[int], rates: list[float], moved: Sequence[bool], began: float
    ) -> None:
        """Note one batch: its pages, and GB/s."""
        num_pages = sum(moved)
        if not (self._config.enable_storage_metrics and num_pages) or len(pages) >= _MAX_SAMPLES:
            return
        pages.append(num_pages)
        num_bytes = num_pages * self._shared.page_bytes
        rates.append(num_bytes / (1 << 30) / max(time.monotonic() - began, 1e-9))
