"""How the KV tier's settings reach SGLang's schedulers, and how its counters come back.

The tier is used by processes that SGLang starts, one for each rank. SGLang logs its arguments and
tells them to whoever asks, and the settings hold passwords: so they travel in a file that only this
user can read, and that is gone as soon as SGLang has read it. Counters come back in files as well.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from deployments.engine.errors import EngineSetupError
from kv_store.codecs.registry import load_codec
from kv_store.config import KVStoreConfig
from kv_store.layout import PAGE_TOKENS
from kv_store.page_store import PageStoreStats, TierStats

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

logger = logging.getLogger(__name__)

_BACKEND = {
    "backend_name": "paceline",
    "module_path": "deployments.engine.sglang_engine.hicache_backend",
    "class_name": "PacelineStorage",
    # Otherwise pages go through one more copy each.
    "interface_v1": 1,
}
_FOLDER_KEY = "paceline_folder"
_SETTINGS_FILE = "settings.json"
_WRITE_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSettings:
    """What a rank needs to share its pages.

    Attributes:
        kv: the tier.
        model_digest: of the model's files.
        arithmetic: names what else decides a page's bits, such as SGLang's version.
        load_timeout_s: that a request waits for its pages.
    """

    kv: KVStoreConfig
    model_digest: str
    arithmetic: str
    load_timeout_s: float


def check_codec(kv: KVStoreConfig) -> None:
    """Refuse codecs that lose something.

    Raises:
        EngineSetupError: names the setting.
    """
    try:
        codec = load_codec(kv.codec)
    except ValueError as error:
        raise EngineSetupError(f"kv.codec: {error}") from error
    if not codec.is_lossless:
        raise EngineSetupError(
            f"kv.codec: {kv.codec} loses precision, and what that costs is not measured for pages "
            "of SGLang; use raw or lossless"
        )


class TierLink:
    """The replica's end. Owns a folder that only this user can enter."""

    def __init__(self, settings: TierSettings) -> None:
        """Make the folder."""
        self._settings = settings
        self._folder = TemporaryDirectory(prefix="paceline-sglang-", ignore_cleanup_errors=True)

    @contextmanager
    def offered(self) -> Iterator[str]:
        """Within, SGLang can attach the tier by this ``hicache_storage_backend_extra_config``."""
        timeout_s = self._settings.load_timeout_s
        path = Path(self._folder.name) / _SETTINGS_FILE
        _write_private(path, json.dumps(asdict(self._settings) | {"kv": _revealed(self._settings)}))
        try:
            yield json.dumps(
                _BACKEND
                | {
                    _FOLDER_KEY: self._folder.name,
                    "prefetch_threshold": PAGE_TOKENS,
                    "prefetch_timeout_base": timeout_s,
                    "prefetch_timeout_per_ki_token": 0,
                }
            )
        finally:
            path.unlink()

    def stats(self) -> PageStoreStats:
        """Sums over all ranks, at most some seconds old."""
        folder = Path(self._folder.name)
        return _total([_read_stats(path) for path in sorted(folder.glob("stats-*.json"))])

    def close(self) -> None:
        """Remove the folder. Idempotent."""
        self._folder.cleanup()


def folder_of(extra_config: dict[str, Any] | None) -> Path:
    """The folder that SGLang's ``extra_config`` of the backend leads to.

    Raises:
        ValueError: it was not made by ``TierLink.offered``.
    """
    folder = (extra_config or {}).get(_FOLDER_KEY)
    if not isinstance(folder, str):
        raise ValueError(  # noqa: TRY004 - a wrong setting, of whatever type
            f"the storage backend's configuration has no {_FOLDER_KEY}"
        )
    return Path(folder)


def read_settings(folder: Path) -> TierSettings:
    """What the replica offers.

    Raises:
        OSError: it offers nothing now.
        ValueError: not settings.
    """
    values = json.loads((folder / _SETTINGS_FILE).read_text(encoding="utf-8"))
    return TierSettings(**values | {"kv": KVStoreConfig.model_validate(values["kv"])})


class StatsWriter:
    """Writes a rank's counters for its replica until closed, on a thread of its own."""

    def __init__(self, folder: Path, stats: Callable[[], PageStoreStats]) -> None:
        """Start.

        Args:
            folder: of the replica.
            stats: a snapshot.
        """
        self._path = folder / f"stats-{secrets.token_hex(8)}.json"
        self._stats = stats
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-stats", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write once more and stop. Idempotent."""
        self._is_closing.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            is_last = self._is_closing.wait(_WRITE_PERIOD_S)
            part = self._path.with_suffix(".part")
            try:
                part.write_text(json.dumps(asdict(self._stats())), encoding="utf-8")
                part.replace(self._path)
            except OSError as error:
                logger.info("the KV tier's counters are not reported any more: %s", error)
                return
            if is_last:
                return


def _write_private(path: Path, text: str) -> None:
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(text, encoding="utf-8")


def _revealed(settings: TierSettings) -> Any:  # noqa: ANN401 - JSON
    """The tier's settings as JSON values, secrets included."""

    def plain(value: object) -> str:
        return value.get_secret_value() if isinstance(value, SecretStr) else str(value)

    return json.loads(json.dumps(settings.kv.model_dump(), default=plain))


def _read_stats(path: Path) -> PageStoreStats:
    values = json.loads(path.read_text(encoding="utf-8"))
    tiers = {name: TierStats(**tier) for name, tier in values.pop("tiers").items()}
    return PageStoreStats(**values, tiers=tiers)


def _total(ranks: Sequence[PageStoreStats]) -> PageStoreStats:
    counts = {
        field.name: sum(getattr(rank, field.name) for rank in ranks)
        for field in fields(PageStoreStats)
        if field.name != "tiers"
    }
    names = sorted({name for rank in ranks for name in rank.tiers})
    return PageStoreStats(
        **counts,
        tiers={
            name: _total_tier(name, [rank.tiers[name] for rank in ranks if name in rank.tiers])
            for name in names
        },
    )


def _total_tier(name: str, tiers: Sequence[TierStats]) -> TierStats:
    counts: dict[str, int] = {}
    for field in fields(TierStats):
        if field.name.startswith("num_"):
            numbers = [getattr(tier, field.name) for tier in tiers]
            counts[field.name] = -1 if -1 in numbers else sum(numbers)
    return TierStats(name=name, is_open=all(tier.is_open for tier in tiers), **counts)
