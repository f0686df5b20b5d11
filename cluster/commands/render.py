"""``paceline render``: a config as Ray Serve's deployment file, or the schema of configs."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from cluster.commands.options import ConfigOption  # noqa: TC001 - typer reads it at run time
from cluster.config import config_json_schema
from cluster.config_loader import load_config
from cluster.manifest import render as render_manifest


def render(
    config: ConfigOption = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of configs instead.")
    ] = False,
) -> None:
    """Print the serveConfigV2 of a config; secrets are left out and named."""
    if schema:
        sys.stdout.write(json.dumps(config_json_schema(), indent=2) + "\n")
        return
    sys.stdout.write(render_manifest(load_config(config)).to_yaml())
