"""``paceline fetch``: brings a model's weights to this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import ConfigOption  # noqa: TC001 - typer reads it at run time
from cluster.config_loader import load_config
from cluster.console import out, steps
from cluster.preparation import fetch_weights


def fetch(
    config: ConfigOption = None,
    model: Annotated[
        str | None,
        typer.Option(help="The built-in model or a Hugging Face id."),
    ] = None,
) -> None:
    """Download the model; does nothing when it is already here."""
    settings = load_config(config)
    name = model or settings.engine.model
    with steps() as report:
        report(f"looking for {name}")
        folder = fetch_weights(name, settings.cache_dir, report)
    out.print(f"{name} is in {folder}")
