"""``paceline fetch``: brings weights to this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import ConfigOption  # noqa: TC001 - typer reads it at run time
from cluster.config_loader import load_config
from cluster.console import out, steps
from cluster.preparation import config_models, fetch_weights


def fetch(
    config: ConfigOption = None,
    model: Annotated[
        str | None,
        typer.Option(help="The built-in model or a Hugging Face id, instead of the config's."),
    ] = None,
) -> None:
    """Download the config's models; does nothing when they are already here."""
    settings = load_config(config)
    folders = {}
    with steps() as report:
        for name in (model,) if model else config_models(settings):
            report(f"looking for {name}")
            folders[name] = fetch_weights(name, settings.cache_dir, report)
    for name, folder in folders.items():
        out.print(f"{name} is in {folder}")
