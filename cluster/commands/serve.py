"""``paceline serve``: a cluster on this machine until a signal comes."""

from __future__ import annotations

import threading
from typing import Annotated

import typer

from cluster import preparation
from cluster.commands.options import ConfigOption  # noqa: TC001 - typer reads it at run time
from cluster.config_loader import load_config
from cluster.console import err, out, steps
from cluster.errors import ClusterError
from cluster.local_cluster import STOP_TIMEOUT_S, LocalCluster
from cluster.serve_app import paceline_app
from cluster.signals import StopRequestedError, stop_on_signals


def serve(
    config: ConfigOption = None,
    prepare: Annotated[
        bool,
        typer.Option("--prepare", help="First fetch weights and fit the draft, where missing."),
    ] = False,
) -> None:
    """Start a cluster on this machine and keep it until Ctrl-C."""
    settings = load_config(config)

    def say_stopping() -> None:
        err.print(f"[yellow]stopping; this takes up to {STOP_TIMEOUT_S:.0f} s[/]")

    with steps() as report:
        if prepare:
            preparation.prepare(settings, report)
        else:
            report("looking for the model's weights")
            preparation.check_prepared(settings)
        cluster = LocalCluster(settings, paceline_app(), on_progress=report)
        try:
            with stop_on_signals(on_repeat=say_stopping), cluster:
                state = cluster.state
                out.print(f"[bold green]ready[/]  {state.model}  (cluster {state.cluster_id})")
                out.print(f"  HTTP     {state.http_url}/v1")
                out.print(f"  gRPC     {state.grpc_address}")
                out.print(f"  metrics  {state.metrics_url}")
                out.print("  try      paceline chat 'Why is the sky blue?'")
                report("serving until Ctrl-C")
                threading.Event().wait()
        except StopRequestedError:
            left = cluster.num_processes_left
            if left:
                raise ClusterError(f"{left} processes did not end") from None
    out.print("stopped, nothing is left")
