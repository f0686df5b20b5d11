"""``paceline kv``: what the shared KV tiers hold."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from cluster.commands.options import (  # noqa: TC001 - typer reads them at run time
    ClusterOption,
    ConfigOption,
    JsonOption,
)
from cluster.config_loader import load_config
from cluster.console import out
from cluster.errors import NoClusterError
from cluster.hot_tier import cluster_valkey
from cluster.kv_usage import SsdUsage, ValkeyUsage, ssd_usage, valkey_usage
from cluster.state import default_state_dir, find_cluster
from kv_store.config import SsdTierConfig, ValkeyTierConfig
from kv_store.tiers.valkey_topology import valkey_address

if TYPE_CHECKING:
    from cluster.config import ClusterConfig

_MIB = 1 << 20


def kv(
    config: ConfigOption = None, cluster: ClusterOption = None, as_json: JsonOption = False
) -> None:
    """Show the pages and bytes of the tiers of a running cluster, or of a config's."""
    usages = _of_config(load_config(config)) if config else _of_cluster(cluster)
    if as_json:
        sys.stdout.write(json.dumps([asdict(usage) for usage in usages], indent=2) + "\n")
        return
    table = Table("tier", "where", "pages", "MiB", "limit MiB", "evicted")
    for usage in usages:
        if isinstance(usage, ValkeyUsage):
            limit = f"{usage.max_bytes / _MIB:.0f}" if usage.max_bytes else "none"
            used = f"{usage.used_bytes / _MIB:.1f}"
            evicted = str(usage.num_evicted)
            table.add_row("valkey", usage.address, str(usage.num_pages), used, limit, evicted)
        else:
            where = f"{usage.path} ({usage.num_replicas} replicas)"
            table.add_row("ssd", where, "", f"{usage.num_bytes / _MIB:.1f}", "", "")
    out.print(table)


def _of_config(config: ClusterConfig) -> list[ValkeyUsage | SsdUsage]:
    usages: list[ValkeyUsage | SsdUsage] = []
    for tier in config.kv.tiers if config.kv else ():
        if isinstance(tier, ValkeyTierConfig):
            usages.append(valkey_usage(valkey_address(tier)))
        elif isinstance(tier, SsdTierConfig):
            usages.append(ssd_usage(tier.root))
    if not usages:
        raise NoClusterError(
            "this config has no tier that can be asked; one with an embedded Valkey has it only "
            "while its cluster runs: paceline kv without --config"
        )
    return usages


def _of_cluster(cluster_id: str | None) -> list[ValkeyUsage | SsdUsage]:
    state = find_cluster(default_state_dir(), cluster_id)
    usages: list[ValkeyUsage | SsdUsage] = []
    if address := cluster_valkey(Path(state.run_dir)):
        usages.append(valkey_usage(address))
    usages.extend(ssd_usage(Path(root)) for root in state.ssd_roots)
    if not usages:
        raise NoClusterError(f"cluster {state.cluster_id} shares no KV pages")
    return usages
