"""A report's rows for a terminal."""

from __future__ import annotations

import sys
from typing import Any


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """All rows have the first one's columns."""
    if not rows:
        return
    names = list(rows[0])
    cells = [names] + [[_text(row[name]) for name in names] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    sys.stdout.write(f"\n{title}\n")
    for line in cells:
        sys.stdout.write(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + "\n"
        )
    sys.stdout.flush()


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
