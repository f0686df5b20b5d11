"""What commands say, and where: results on stdout, everything else on stderr."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Show what goes on: a line with its time for each step, and a spinner behind the last one."""
    started = time.monotonic()

    with err.status("") as status:

        def report(message: str) -> None:
            style = "yellow" if message.startswith("warning") else "dim"
            err.print(f"[{style}]{time.monotonic() - started:6.1f} s[/]  {escape(message)}")
            status.update(escape(message))

        yield report


def fail(message: str) -> None:
    """Say why a command ends."""
    err.print(f"[bold red]error:[/] {escape(message)}")
