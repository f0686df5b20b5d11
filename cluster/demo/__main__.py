"""Runs the demo: prepares what is missing, starts a cluster, measures, stops, reports."""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr
from rich.markup import escape
from rich.table import Table

from cluster.config import ClusterConfig, PoolConfig, PoolsConfig, ServerConfig
from cluster.console import err, fail, out, steps
from cluster.demo.expectations import broken_expectations
from cluster.errors import ClusterError
from cluster.kv_usage import count_ssd_pages
from cluster.local_cluster import LocalCluster
from cluster.preparation import prepare
from cluster.serve_app import paceline_app
from cluster.signals import StopRequestedError, stop_on_signals
from deployments.config import AuthConfig, TenantConfig
from deployments.engine.config import SpeculationConfig, TorchEngineConfig
from deployments.engine.errors import WeightsMissingError
from kv_store.config import EmbeddedValkeyTierConfig, KVStoreConfig, SsdTierConfig

if TYPE_CHECKING:
    from collections.abc import Callable

REPORT_PATH = Path("build/reports/demo.json")
_VALKEY_BYTES = 256 << 20
_SSD_BYTES = 1 << 30


def demo_config(ssd_root: Path, api_key: str) -> ClusterConfig:
    """Two float32 targets and one drafter, pages stored as they are, one tenant.

    Drafts are short: one pays only if it is there when the round in flight ends.
    """
    tenant = TenantConfig(name="demo", api_keys=(SecretStr(api_key),))
    return ClusterConfig(
        engine=TorchEngineConfig(
            dtype="float32", speculation=SpeculationConfig(num_draft_tokens=3, fanout=2)
        ),
        pools=PoolsConfig(target=PoolConfig(replicas=2)),
        kv=KVStoreConfig(
            codec="raw",
            tiers=(
                EmbeddedValkeyTierConfig(max_memory_bytes=_VALKEY_BYTES),
                SsdTierConfig(root=ssd_root, budget_bytes=_SSD_BYTES),
            ),
        ),
        auth=AuthConfig(tenants=(tenant,), cluster_secret=SecretStr(secrets.token_hex(32))),
        server=ServerConfig(http_port=0, grpc_port=0),
    )


def run(on_progress: Callable[[str], None]) -> dict[str, Any]:
    """The whole demo; the report holds nothing that was not measured."""
    # The OpenAI SDK is a development dependency; without it the error names it.
    from cluster.demo.clients import DemoClients
    from cluster.demo.scenario import Terminal, run_scenario

    started = time.monotonic()
    api_key = secrets.token_urlsafe(24)
    with tempfile.TemporaryDirectory(prefix="paceline-demo-") as folder:
        ssd_root = Path(folder) / "ssd"
        config = demo_config(ssd_root, api_key)
        prepare(config, on_progress)
        cluster = LocalCluster(config, paceline_app(), on_progress=on_progress)
        with cluster:
            ready_after = time.monotonic() - started
            terminal = Terminal(
                step=on_progress, text=lambda text: out.print(escape(text), end="", style="cyan")
            )
            with DemoClients(cluster.state, api_key) as clients:
                report = run_scenario(clients, cluster.state, terminal)
        report["kv"]["ssd_pages"] = count_ssd_pages(ssd_root)
    report["processes_left"] = cluster.num_processes_left
    report["seconds"] = {
        "until_ready": round(ready_after, 1),
        "in_all": round(time.monotonic() - started, 1),
    }
    return report


def main() -> int:
    """Run the demo and judge it; 0 if everything holds."""
    try:
        with stop_on_signals(lambda: err.print("stopping")), steps() as report_step:
            report = run(report_step)
    except StopRequestedError:
        fail("interrupted; everything was stopped")
        return 1
    except (ClusterError, WeightsMissingError) as error:
        fail(str(error))
        return 1
    REPORT_PATH.parent.mkdir(parents=True, exist_ok=True)
    REPORT_PATH.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _show(report)
    broken = broken_expectations(report)
    for name in broken:
        fail(f"does not hold: {name}")
    out.print(f"report: {REPORT_PATH}")
    return 1 if broken else 0


def _show(report: dict[str, Any]) -> None:
    spec, kv, ttft = report["speculation"], report["kv"], report["ttft_ms"]
    table = Table(title=f"Paceline demo: {report['model']}", title_justify="left")
    table.add_column("what")
    table.add_column("measured", justify="right")
    rows = {
        "same text over HTTP and gRPC": report["identical"],
        f"same text with and without speculation ({spec['pairs']} pairs)": spec["on_equals_off"],
        "draft tokens accepted, of them from the draft pool": (
            f"{spec['accepted_tokens']}, {spec['pool_accepted_tokens']}"
        ),
        "outcome table hits": spec["table_hits"],
        "mean acceptance length": f"{spec['mean_acceptance_length']:.2f}",
        "tokens per second, speculation on / off": (
            f"{spec['tokens_per_s_on']} / {spec['tokens_per_s_off']}"
        ),
        "prompt tokens the second replica did not compute": kv["second_replica_cached_tokens"],
        "pages in Valkey / on SSD": f"{kv['valkey_pages']} / {kv['ssd_pages']}",
        "time to first token, cold / pages from the tier": (
            f"{ttft['cold']:.0f} ms / {ttft['warm']:.0f} ms"
        ),
        "processes left after the stop": report["processes_left"],
        "seconds until ready / in all": (
            f"{report['seconds']['until_ready']} / {report['seconds']['in_all']}"
        ),
    }
    for what, measured in rows.items():
        table.add_row(what, str(measured))
    out.print(table)


if __name__ == "__main__":
    sys.exit(main())
