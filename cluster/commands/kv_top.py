"""``paceline kv top``: the KV tiers of a running cluster, as they work."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table

from cluster.commands.options import ClusterOption  # noqa: TC001 - typer reads it at run time
from cluster.console import out
from cluster.hot_tier import cluster_valkey
from cluster.kv_pages import NamespaceSum, sum_by_namespace, valkey_pages
from cluster.kv_top import Activity, TierActivity, activity
from cluster.kv_usage import SsdUsage, ValkeyUsage, ssd_usage, valkey_usage
from cluster.metrics_reader import MetricsSnapshot
from cluster.state import default_state_dir, find_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.state import ClusterState

_MIB = 1 << 20
_MAX_NAMESPACES = 10


class _Sample(NamedTuple):
    activity: Activity
    usages: list[ValkeyUsage | SsdUsage]
    namespaces: list[NamespaceSum]


def top(
    cluster: ClusterOption = None,
    interval: Annotated[float, typer.Option(min=0.5, help="Seconds between two looks.")] = 2.0,
    looks: Annotated[
        int, typer.Option("--count", min=0, help="Looks until it ends; 0 goes on until Ctrl-C.")
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line for every look.")
    ] = False,
) -> None:
    """Watch hit rates, traffic and bytes of the tiers, and the largest tenants in Valkey.

    The first look is at all since the replicas' start. Ray's metrics are some seconds old.
    """
    samples = _samples(find_cluster(default_state_dir(), cluster), interval, looks)
    try:
        if as_json:
            for sample in samples:
                document = {
                    **asdict(sample.activity),
                    "usage": [asdict(usage) for usage in sample.usages],
                    "namespaces": [asdict(row) for row in sample.namespaces],
                }
                sys.stdout.write(json.dumps(document) + "\n")
                sys.stdout.flush()
            return
        with Live(console=out, auto_refresh=False) as live:
            for sample in samples:
                live.update(_draw(sample), refresh=True)
    except KeyboardInterrupt:
        return


def _samples(state: ClusterState, interval_s: float, num_looks: int) -> Iterator[_Sample]:
    address = cluster_valkey(Path(state.run_dir))
    before: MetricsSnapshot | None = None
    before_at = 0.0
    for look in count(1):
        now, now_at = MetricsSnapshot.read(state.metrics_url), time.monotonic()
        usages: list[ValkeyUsage | SsdUsage] = [valkey_usage(address)] if address else []
        usages += [ssd_usage(Path(root)) for root in state.ssd_roots]
        namespaces = sum_by_namespace(valkey_pages(address)) if address else []
        yield _Sample(
            activity(now, before, now_at - before_at), usages, namespaces[:_MAX_NAMESPACES]
        )
        if look == num_looks:
            return
        before, before_at = now, now_at
        time.sleep(interval_s)


def _draw(sample: _Sample) -> Group:
    seen = sample.activity
    unit = f"pages/s of {seen.seconds:.1f} s" if seen.seconds else "pages since the start"
    tiers = Table(
        *("tier", "hit rate", "hits", "misses", "puts", "moved", "served", "refused", "faults"),
        title=f"{unit}; waiting to be written {seen.num_queued}, lost {seen.dropped:.4g}; prompt "
        f"tokens from the replica {_percent(seen.from_replica)}, from tiers "
        f"{_percent(seen.from_tier)}",
        title_justify="left",
    )
    for tier in seen.tiers:
        tiers.add_row(tier.tier, _percent(tier.hit_rate), *_numbers(tier))
    held = Table("tier", "where", "pages", "MiB", "limit MiB", "evicted")
    for usage in sample.usages:
        if isinstance(usage, ValkeyUsage):
            limit = f"{usage.max_bytes / _MIB:.0f}" if usage.max_bytes else "none"
            numbers = (str(usage.num_pages), f"{usage.used_bytes / _MIB:.1f}", limit)
            held.add_row("valkey", usage.address, *numbers, str(usage.num_evicted))
        else:
            held.add_row("ssd", usage.path, "", f"{usage.num_bytes / _MIB:.1f}", "", "")
    namespaces = Table("namespace", "pages", "MiB")
    for row in sample.namespaces:
        namespaces.add_row(row.namespace, str(row.num_pages), f"{row.num_bytes / _MIB:.1f}")
    return Group(tiers, held, namespaces)


def _numbers(tier: TierActivity) -> list[str]:
    values = (
        tier.hits,
        tier.misses,
        tier.puts,
        tier.moved,
        tier.served,
        tier.refused,
        tier.faults,
    )
    return [f"{value:.4g}" for value in values]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
