"""``paceline train``: makes draft models."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import ConfigOption  # noqa: TC001 - typer reads it at run time
from cluster.config_loader import load_config
from cluster.console import out, steps
from cluster.preparation import DEFAULT_TOKENS_BUDGET, fit_student

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
