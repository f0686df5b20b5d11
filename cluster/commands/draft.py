"""``paceline draft``: new drafts for a cluster that runs."""

from __future__ import annotations

import json
import shlex
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cluster.commands.options import (  # noqa: TC001 - typer reads them at run time
    ConfigOption,
    JsonOption,
)
from cluster.config_loader import load_config
from cluster.console import out, steps
from cluster.draft_refresh import offer, open_shelf, refresh, wait_for_decision

if TYPE_CHECKING:
    from deployments.engine.torch_engine.student_shelf import Decision, StudentShelf

_FOLDER = Path("build/refresh")
_WaitOption = Annotated[
    bool, typer.Option("--wait", help="Wait for what becomes of it; Ctrl-C ends only the wait.")
]

app = typer.Typer(help="Refresh the drafts of a running cluster.", no_args_is_help=True)


@app.command("canary")
def canary(
    source: Annotated[
        Path, typer.Argument(help="A student.safetensors, or the folder of its training.")
    ],
    config: ConfigOption = None,
    wait: _WaitOption = False,
) -> None:
    """Put a student on trial: it drafts for a share of the sessions until it is judged.

    The config is the cluster's; its draft replicas take the student up within seconds.
    """
    _follow(offer(load_config(config), source), wait)


@app.command("refresh")
def refresh_(
    config: ConfigOption = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="As for train draft; may be repeated. The config's traffic log by default."
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of the work; goes on with what was interrupted.")
    ] = _FOLDER,
    wait: _WaitOption = False,
) -> None:
    """Train a student on what the cluster was asked, and put it on trial."""
    with steps() as tell:
        shelf = refresh(
            load_config(config),
            folder,
            prompt_files=prompts or [],
            command_line=shlex.join(["paceline", *sys.argv[1:]]),
            on_progress=tell,
        )
    _follow(shelf, wait)


@app.command("rollback")
def rollback(config: ConfigOption = None) -> None:
    """End a trial; where there is none, go back to the student before the last promotion."""
    from deployments.engine.torch_engine.student_shelf import Decision

    decision = Decision(
        outcome="withdrawn", reason="paceline draft rollback", decided_at=time.time()
    )
    path = open_shelf(load_config(config)).roll_back(decision)
    out.print(f"drafts come from {path}" if path else "there is nothing to go back to")


@app.command("show")
def show(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show which student drafts, which one is on trial, and what became of the last one."""
    report = _report(open_shelf(load_config(config)))
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
        return
    table = Table(show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("drafts", report["in_use"])
    table.add_row("on trial", report["candidate"] or "none")
    decision = report["last_decision"]
    table.add_row("last candidate", _told(decision) if decision else "none")
    out.print(table)


def _report(shelf: StudentShelf) -> dict[str, Any]:
    decision = shelf.last_decision()
    return {
        "in_use": str(shelf.in_use()),
        "candidate": str(shelf.candidate) if shelf.candidate.is_file() else None,
        "last_decision": asdict(decision) if decision else None,
    }


def _follow(shelf: StudentShelf, wait: bool) -> None:
    out.print(f"on trial: {shelf.candidate}")
    if not wait:
        out.print("what becomes of it: paceline draft show")
        return
    with steps() as tell:
        tell("drafting for a share of the sessions")
        decision: Decision | None = wait_for_decision(shelf)
    out.print(_told(asdict(decision)) if decision else "it went without a decision")


def _told(decision: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(decision["decided_at"], UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return f"{decision['outcome'].replace('_', ' ')} at {when}: {decision['reason']}"
