"""The cluster's own Valkey: started before the replicas, stopped after them, shared by all.

``kv_store`` would start an embedded server per store, hence one per replica and nothing shared.
A cluster starts one, and tells its replicas where.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import redis
from pydantic import SecretStr

from kv_store.config import EmbeddedValkeyTierConfig, SsdTierConfig, ValkeyTierConfig
from kv_store.tiers.embedded_valkey import EmbeddedValkey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cluster.config import ClusterConfig
    from kv_store.config import TierConfig

_URL_FILE = "kv-url"
_PROBE_TIMEOUT_S = 1.0


@contextmanager
def hot_tier(
    config: ClusterConfig, run_dir: Path, on_progress: Callable[[str], None]
) -> Iterator[ClusterConfig]:
    """Start what the KV tiers need, and yield the config that replicas get.

    A server of somebody else's that does not answer is no error: requests go on without it, and
    replicas use it as soon as it is back. It is only said.

    Args:
        config: the settings.
        run_dir: the cluster's folder; the address, password included, is left there for its owner.
        on_progress: told what happens.

    Raises:
        TierUnavailableError: the embedded server does not start.
    """
    if config.kv is None:
        yield config
        return
    with ExitStack() as servers:
        tiers: list[TierConfig] = []
        for tier in config.kv.tiers:
            if isinstance(tier, EmbeddedValkeyTierConfig):
                on_progress("starting Valkey")
                server = EmbeddedValkey(tier.max_memory_bytes)
                server.start()
                servers.callback(server.stop)
                settings = tier.model_dump(exclude={"kind", "max_memory_bytes"})
                tiers.append(ValkeyTierConfig(url=SecretStr(server.url), **settings))
            else:
                tiers.append(tier)
        for tier in tiers:
            if isinstance(tier, ValkeyTierConfig):
                url = tier.url.get_secret_value()
                _write_private(run_dir / _URL_FILE, url)
                if problem := valkey_problem(url):
                    on_progress(
                        f"warning: Valkey at {public_address(url)} is unreachable ({problem}); "
                        "going on without it until it is back"
                    )
        yield config.model_copy(update={"kv": config.kv.model_copy(update={"tiers": tuple(tiers)})})


def cluster_valkey_url(run_dir: Path) -> str | None:
    """The address that a running cluster of this user left, password included."""
    try:
        return (run_dir / _URL_FILE).read_text()
    except FileNotFoundError:
        return None


def valkey_problem(url: str) -> str | None:
    """Why a server cannot be used, or None."""
    try:
        with redis.Redis.from_url(
            url, socket_connect_timeout=_PROBE_TIMEOUT_S, socket_timeout=_PROBE_TIMEOUT_S
        ) as client:
            client.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        return type(error).__name__
    return None


def public_address(url: str) -> str:
    """A server's address without credentials."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"


def hot_tier_address(config: ClusterConfig) -> str | None:
    """The public address of the first Valkey tier, if there is one."""
    for tier in config.kv.tiers if config.kv else ():
        if isinstance(tier, ValkeyTierConfig):
            return public_address(tier.url.get_secret_value())
    return None


def ssd_roots(config: ClusterConfig) -> list[str]:
    """The folders of the warm tiers."""
    tiers = config.kv.tiers if config.kv else ()
    return [str(tier.root) for tier in tiers if isinstance(tier, SsdTierConfig)]


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(text)
