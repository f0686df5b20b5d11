"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
