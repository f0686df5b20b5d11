"""``paceline train``: makes draft models."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.commands.options import (  # noqa: TC001 - typer reads them at run time
    ConfigOption,
    JsonOption,
)
from cluster.config_loader import load_config
from cluster.console import out, steps
from cluster.draft_training import train_draft
from cluster.preparation import DEFAULT_TOKENS_BUDGET, fit_student

_FOLDER = Path("build/draft")

app = typer.Typer(help="Make draft models.", no_args_is_help=True)


@app.callback()
def _train() -> None:
    """Make draft models."""


@app.command("student")
def student(
    config: ConfigOption = None,
    tokens: Annotated[
        int, typer.Option(min=1000, help="Tokens of the target's own text to fit on.")
    ] = DEFAULT_TOKENS_BUDGET,
) -> None:
    """Cut a small draft out of the config's model and fit it to the model's own answers."""
    settings = load_config(config)
    with steps() as report:
        path = fit_student(
            settings.engine.model,
            settings.cache_dir,
            tokens_budget=tokens,
            on_progress=report,
        )
    out.print(f"the draft of {settings.engine.model} is {path}")


@app.command("draft")
def draft(
    config: ConfigOption = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            help="One prompt a line, or conversations as .jsonl; may be repeated. The package's "
            "own 128 prompts by default."
        ),
    ] = None,
    licence: Annotated[
        list[str] | None,
        typer.Option(help="Of each file of --prompts, in their order; for the draft's card."),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option(
            help="Prompts that only evaluations see; some of the others by default. May be "
            "repeated."
        ),
    ] = None,
    self_chat: Annotated[
        bool,
        typer.Option(
            "--self-chat",
            help="No --prompts: the model writes what users might ask, and answers it.",
        ),
    ] = False,
    folder: Annotated[
        Path,
        typer.Option("--out", help="Folder of the work and of the draft; goes on with its work."),
    ] = _FOLDER,
    as_json: JsonOption = False,
) -> None:
    """Train a draft for the config's model on what the model writes itself.

    Killed at any time, the same command goes on where it was. Settings are those of the config's
    section training.
    """
    settings = load_config(config)
    with steps() as tell:
        report, draft_folder = train_draft(
            settings,
            folder,
            prompt_files=prompts or [],
            licences=licence or [],
            self_chat=self_chat,
            held_out_files=held_out or [],
            command_line=shlex.join(["paceline", *sys.argv[1:]]),
            on_progress=tell,
        )
    if as_json:
        sys.stdout.write(json.dumps(asdict(report), indent=2) + "\n")
        return
    before, after = report.curve[0].quality, report.best.quality
    table = Table("draft tokens", "a round commits", "before", "accepted at", "before", "predicted")
    for index, share in enumerate(after.acceptance):
        table.add_row(
            str(index + 1),
            f"{after.mean_acceptance_length[index]:.3f}",
            f"{before.mean_acceptance_length[index]:.3f}",
            f"{share:.3f}",
            f"{before.acceptance[index]:.3f}",
            f"{report.best.speed_ups.chains[index]:.2f}x",
        )
    out.print(table)
    out.print(f"the draft and its card are in {draft_folder}")
