"""The ``paceline`` command."""

from __future__ import annotations

import logging
import sys

import typer

from cluster.commands import bench, chat, doctor, draft, fetch, kv, render, serve, status, train
from cluster.console import fail
from cluster.errors import ClusterError
from deployments.engine.errors import WeightsMissingError

WEIGHTS_MISSING_EXIT_CODE = 6

app = typer.Typer(
    name="paceline",
    help="Distributed LLM serving: split speculative decoding and a shared KV tier.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("serve")(serve.serve)
app.command("status")(status.status)
app.command("chat")(chat.chat)
app.command("doctor")(doctor.doctor)
app.command("fetch")(fetch.fetch)
app.command("render")(render.render)
app.add_typer(bench.app, name="bench")
app.add_typer(kv.app, name="kv")
app.add_typer(train.app, name="train")
app.add_typer(draft.app, name="draft")


@app.callback()
def _logging(verbose: bool = typer.Option(False, "--verbose", "-v", help="Log at DEBUG.")) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )


def main() -> None:
    """Run the command; an expected error is one message and an exit code, never a traceback."""
    try:
        app()
    except ClusterError as error:
        fail(str(error))
        sys.exit(error.exit_code)
    except WeightsMissingError as error:
        fail(str(error))
        sys.exit(WEIGHTS_MISSING_EXIT_CODE)
