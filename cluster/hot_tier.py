"""The cluster's own Valkey: started before the replicas, stopped after them, shared by all.

``kv_store`` would start an embedded server per store, hence one per replica and nothing shared.
A cluster starts one, and tells its replicas where.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import SecretStr

from cluster.errors import ConfigError
from kv_store.config import EmbeddedValkeyTierConfig, SsdTierConfig, ValkeyTierConfig
from kv_store.errors import TierUnavailableError
from kv_store.tiers.embedded_valkey import EmbeddedValkey
from kv_store.tiers.valkey_admin import public_address
from kv_store.tiers.valkey_settings import SettingsProblem, check_settings
from kv_store.tiers.valkey_topology import ValkeyAddress, valkey_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cluster.config import ClusterConfig
    from kv_store.config import TierConfig

_ADDRESS_FILE = "kv-address.json"
_PROBE_TIMEOUT_S = 1.0


@contextmanager
def hot_tier(
    config: ClusterConfig, run_dir: Path, on_progress: Callable[[str], None]
) -> Iterator[ClusterConfig]:
    """Start what the KV tiers need, and yield the config that replicas get.

    A server of somebody else's that does not answer is no error: requests go on without it, and
    replicas use it as soon as it is back. It is only said, as are settings that waste pages.

    Args:
        config: the settings.
        run_dir: the cluster's folder; the address, password included, is left there for its owner.
        on_progress: told what happens.

    Raises:
        TierUnavailableError: the embedded server does not start.
        ConfigError: a server answers and is not set up to hold pages.
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
                address = valkey_address(tier)
                _write_private(run_dir / _ADDRESS_FILE, json.dumps(asdict(address)))
                _report(tier, public_address(address.url), on_progress)
        yield config.model_copy(update={"kv": config.kv.model_copy(update={"tiers": tuple(tiers)})})


def cluster_valkey(run_dir: Path) -> ValkeyAddress | None:
    """The address that a running cluster of this user left, password included."""
    try:
        return ValkeyAddress(**json.loads((run_dir / _ADDRESS_FILE).read_text()))
    except FileNotFoundError:
        return None


def valkey_problems(tier: ValkeyTierConfig) -> list[SettingsProblem]:
    """What is wrong with a server's settings.

    Raises:
        TierUnavailableError: it cannot be reached.
    """
    return check_settings(valkey_address(tier), _PROBE_TIMEOUT_S)


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


def _report(tier: ValkeyTierConfig, where: str, on_progress: Callable[[str], None]) -> None:
    """Say what is wrong with a server.

    Raises:
        ConfigError: it cannot be used as it is.
    """
    try:
        problems = valkey_problems(tier)
    except TierUnavailableError as error:
        on_progress(
            f"warning: Valkey at {where} is unreachable ({error}); "
            "going on without it until it is back"
        )
        return
    for problem in problems:
        if not problem.is_fatal:
            on_progress(f"warning: Valkey at {where}: {problem.text}")
    fatal = tuple(f"kv.tiers: Valkey at {where}: {p.text}" for p in problems if p.is_fatal)
    if fatal:
        raise ConfigError(fatal)


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as handle:
        handle.write(text)
