"""``paceline kv``: what the shared KV tiers hold, and what their codecs cost."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cluster.calibration import calibrate as measure
from cluster.calibration import draw
from cluster.commands.kv_top import top
from cluster.commands.kv_warm import warm
from cluster.commands.options import (
    ClusterOption,
    ConfigOption,
    JsonOption,
    check_writable,
)
from cluster.config_loader import load_config
from cluster.console import out, steps
from cluster.errors import ConfigError, NoClusterError, RequestError
from cluster.hot_tier import cluster_valkey
from cluster.kv_pages import (
    HeldPage,
    NamespaceSum,
    select_pages,
    ssd_pages,
    sum_by_namespace,
    valkey_pages,
)
from cluster.kv_usage import SsdUsage, ValkeyUsage, ssd_usage, valkey_usage
from cluster.state import default_state_dir, find_cluster
from kv_store.config import KVStoreConfig, SsdTierConfig, ValkeyTierConfig
from kv_store.tiers.valkey_topology import valkey_address

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cluster.config import ClusterConfig

_MIB = 1 << 20
_REPORT = Path("build/reports/kv_calibration.json")

app = typer.Typer(help="Look at the shared KV pages, and drop them.", invoke_without_command=True)
app.command("warm")(warm)
app.command("top")(top)


@app.callback()
def kv(
    context: typer.Context,
    config: ConfigOption = None,
    cluster: ClusterOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the pages and bytes of the tiers of a running cluster, or of a config's."""
    if context.invoked_subcommand is None:
        stat(config, cluster, as_json)


@app.command("stat")
def stat(
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


@app.command("ls")
def ls(
    config: ConfigOption = None, cluster: ClusterOption = None, as_json: JsonOption = False
) -> None:
    """List namespaces (one for each tenant, model and fidelity) and what they hold in each tier."""
    rows = sum_by_namespace(_pages(config, cluster))
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return
    out.print(_sums(rows))


@app.command("verify")
def verify(
    config: ConfigOption = None, cluster: ClusterOption = None, as_json: JsonOption = False
) -> None:
    """Read every page and check every byte; exits with 1 if a reader would refuse one.

    Pages that are encrypted at rest (kv.encryption_key) cannot be told from damaged ones here.
    """
    num_pages = 0
    problems: list[dict[str, str]] = []
    for page in _pages(config, cluster):
        num_pages += 1
        if problem := page.problem:
            name = f"{page.namespace}:{page.page_hash}"
            problems.append({"where": page.where, "page": name, "problem": problem})
    if as_json:
        sys.stdout.write(json.dumps({"pages": num_pages, "problems": problems}, indent=2) + "\n")
    else:
        for row in problems:
            out.print(f"{row['where']}: {row['page']}: {row['problem']}")
        out.print(f"{num_pages} pages, {len(problems)} of them unreadable")
    if problems:
        raise typer.Exit(1)


@app.command("drop")
def drop(
    config: ConfigOption = None,
    cluster: ClusterOption = None,
    namespace: Annotated[
        str, typer.Option(help="Of one tenant, model and fidelity: the beginning of its id in ls.")
    ] = "",
    older_than: Annotated[
        float | None, typer.Option(min=0, help="Hours since pages were written, at least.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All pages.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Drop them, do not only say which.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Forget pages in every tier, beside the replicas that use them; without --yes only say which.

    On disk their bytes are overwritten. Replicas find a miss, and compute. Pages that are encrypted
    at rest do not tell their age.
    """
    if not (namespace or older_than is not None or everything):
        raise ConfigError(("say which pages: --namespace, --older-than or --all",))
    before_s = None if older_than is None else time.time() - 3600 * older_than
    dropped: list[HeldPage] = []
    chosen = select_pages(_pages(config, cluster), namespace=namespace, written_before_s=before_s)
    try:
        dropped.extend(page for page in chosen if not yes or page.drop())
    except OSError as error:
        raise RequestError(f"after {len(dropped)} pages: {error}") from error
    rows = sum_by_namespace(dropped)
    if as_json:
        document = {"dropped": yes, "pages": [asdict(row) for row in rows]}
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    out.print(_sums(rows))
    verdict = "dropped" if yes else "would be dropped; --yes drops them"
    out.print(f"{len(dropped)} pages {verdict}")


@app.command("calibrate")
def calibrate(
    config: ConfigOption = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text like those to come, 1280 tokens or more; may be repeated."),
    ] = None,
    report: Annotated[Path, typer.Option(help="Where the report is written.")] = _REPORT,
    as_json: JsonOption = False,
) -> None:
    """Measure every codec on the config's model; replicas refuse those over kv.max_kl."""
    settings = load_config(config)
    check_writable("--report", report)
    with steps() as tell:
        calibration, kept = measure(settings, text or [], tell)
    max_kl = (settings.kv or KVStoreConfig()).max_kl
    document = calibration.model_dump() | {"max_kl": max_kl}
    report.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    picture = report.with_suffix(".png")
    has_picture = draw(calibration, picture)
    if as_json:
        sys.stdout.write(report.read_text(encoding="utf-8"))
        return
    table = Table("codec", "times smaller", "encode GB/s", "decode GB/s", "KL", "top-1", "PPL", "")
    for row in calibration.codecs:
        verdict = "ok" if max_kl is None or row.kl <= max_kl else "refused"
        table.add_row(
            row.codec,
            f"{row.ratio:.2f}",
            f"{row.encode_gb_per_cpu_s:.2f}",
            f"{row.decode_gb_per_cpu_s:.2f}",
            f"{row.kl:.2g}",
            f"{row.top1:.3f}",
            f"{row.perplexity / row.perplexity_untouched - 1:+.2%}",
            verdict,
        )
    out.print(table)
    out.print(f"kept for replicas: {kept}")
    out.print(f"written: {report}" + (f" and {picture}" if has_picture else ""))


def _sums(rows: list[NamespaceSum]) -> Table:
    table = Table("tier", "where", "namespace", "pages", "MiB")
    for row in rows:
        size = f"{row.num_bytes / _MIB:.1f}"
        table.add_row(row.tier, row.where, row.namespace, str(row.num_pages), size)
    return table


def _pages(config: Path | None, cluster: str | None) -> Iterator[HeldPage]:
    """Of the tiers of a running cluster, or of a config's."""
    if config is None:
        state = find_cluster(default_state_dir(), cluster)
        if address := cluster_valkey(Path(state.run_dir)):
            yield from valkey_pages(address)
        for root in state.ssd_roots:
            yield from ssd_pages(Path(root))
        return
    kv_config = load_config(config).kv
    for tier in kv_config.tiers if kv_config else ():
        if isinstance(tier, ValkeyTierConfig):
            yield from valkey_pages(valkey_address(tier))
        elif isinstance(tier, SsdTierConfig):
            yield from ssd_pages(tier.root)


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
