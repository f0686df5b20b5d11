"""``paceline doctor``: can a cluster run here?"""

from __future__ import annotations

import sys

from cluster.commands.options import ConfigOption  # noqa: TC001 - typer reads it at run time
from cluster.config_loader import load_config
from cluster.console import err, out

_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failed": "[bold red]failed[/]"}


def doctor(config: ConfigOption = None) -> None:
    """Check this machine for what the config needs, and say how to mend what is missing."""
    settings = load_config(config)
    # Imported late: it brings torch.
    from cluster.checks import Verdict, run_checks

    num_failed = 0
    with err.status("checking"):
        for finding in run_checks(settings):
            num_failed += finding.verdict is Verdict.FAILED
            hint = f"  [dim]-> {finding.hint}[/]" if finding.hint else ""
            out.print(f"{_MARKS[finding.verdict]:<20} {finding.name:<16} ", end="")
            out.print(finding.detail, markup=False, highlight=False, end="")
            out.print(hint)
    if num_failed:
        sys.exit(1)
