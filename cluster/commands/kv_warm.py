"""``paceline kv warm``: have pages in the tier before anybody asks for them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path  # noqa: TC003 - typer reads it at run time
from typing import Annotated

import typer
from rich.table import Table

from cluster.chat_client import ChatClient
from cluster.commands.options import (  # noqa: TC001 - typer reads them at run time
    ClusterOption,
    JsonOption,
)
from cluster.console import out
from cluster.kv_warm import read_texts
from cluster.kv_warm import warm as warm_texts
from cluster.state import default_state_dir, find_cluster


def warm(
    files: Annotated[
        list[Path],
        typer.Argument(help="Each a system message; as .json, a chat's messages in OpenAI's form."),
    ],
    raw: Annotated[
        bool, typer.Option("--raw", help="Texts are prompts as they are, without a chat template.")
    ] = False,
    url: Annotated[
        str | None, typer.Option(help="A server elsewhere, such as http://host:8000.")
    ] = None,
    cluster: ClusterOption = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="PACELINE_API_KEY", help="Whose pages they are: tenants share none."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=64, help="Texts at once.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Prefill texts once through a running cluster, so that their pages are in the shared tiers.

    Of a system message, all full pages in front of the first question are shared by every chat that
    begins with it. Exits with 1 if a text was not answered.
    """
    texts = read_texts(files, is_raw=raw)
    address = url or find_cluster(default_state_dir(), cluster).http_url
    with ChatClient(address.removesuffix("/v1"), api_key) as client:
        rows = list(warm_texts(client, texts, parallel))
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    else:
        table = Table("text", "prompt tokens", "there before", "seconds", "")
        for row in rows:
            numbers = (str(row.prompt_tokens), str(row.cached_tokens), f"{row.seconds:.1f}")
            table.add_row(row.name, *numbers, row.error or "ok")
        out.print(table)
    if any(row.error for row in rows):
        raise typer.Exit(1)
