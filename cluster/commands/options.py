"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import ConfigError

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="PACELINE_CONFIG",
        help="YAML file; without one the defaults serve the built-in model on this machine.",
    ),
]
ClusterOption = Annotated[
    str | None,
    typer.Option("--cluster", help="Beginning of a cluster's id; the newest one by default."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def check_writable(option: str, path: Path) -> None:
    """Make sure that a file can be written, before the work whose result it shall hold.

    Args:
        option: that names it.
        path: made, with its folders, if it is not there.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ConfigError((f"{option}: {path}: {error.strerror}",)) from error
