"""Keeps the shipped draft's card: picture and extrapolation from its recorded curve, figures in the
engine from the last ``make bench-drafts``.

``make shipped-card`` writes both into the card's marked parts; a report of anything but
``make bench-drafts QUESTIONS=80`` is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cluster.draft_curve import CurvePoint, draw_curve, extrapolation

FOLDER = Path("deployments/engine/torch_engine/data/students")
REPORT = Path("build/reports/drafts.json")
_OPTIONS = {"questions": 80, "tokens": 64, "draft_tokens": 3}
_COVERAGE = 0.919
"""As the card says."""
_MODES = {
    "sync": "the draft alone, asked behind every step",
    "local": "the suffix drafter alone, which has seen 128 other answers",
    "chain": "both, verified together",
    "split": "as a pool serves it, one round ahead, with the suffix drafter",
}


def recorded_points(folder: Path = FOLDER) -> list[CurvePoint]:
    """The curve of the shipped draft, as far as it was kept."""
    rows = map(json.loads, (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        CurvePoint(
            row["num_tokens"],
            tuple(row["acceptance"]),
            {int(length): value for length, value in row["lengths"].items()},
        )
        for row in rows
    ]


def extrapolated(points: list[CurvePoint]) -> str:
    """The card's part on where the curve might lead."""
    return "\n".join(extrapolation(points, _COVERAGE))


def in_the_engine(report: dict[str, Any]) -> str:
    """The card's part on what the draft is worth there.

    Raises:
        ValueError: it was measured with other options, or a text was not that of plain decoding.
    """
    options, rows = report["options"], report["rows"]
    for name, wanted in _OPTIONS.items():
        if options[name] != wanted:
            raise ValueError(f"the card wants {name} = {wanted}, not {options[name]}")
    if any(row["same_text"] != 1 for row in rows):
        raise ValueError("a text differs from plain decoding's")
    found = {(row["mode"], row["temperature"]): row["tokens_per_step"] for row in rows}
    lines = [
        f"Tokens a step commits in the engine with {options['draft_tokens']} draft tokens, over "
        f"{options['tokens']} tokens of answer to each of the {options['questions']} first "
        "questions of MT-bench (`make bench-drafts`):",
        "",
        "| | temperature 0 | temperature 1 |",
        "|---|---|---|",
        *(
            f"| {title} | {found[mode, 0.0]:.3f} | {found[mode, 1.0]:.3f} |"
            for mode, title in _MODES.items()
        ),
    ]
    return "\n".join(lines)


def with_part(card: str, name: str, text: str) -> str:
    """The card with one of its marked parts in other words."""
    opening, closing = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, rest = card.split(opening)
    _, after = rest.split(closing)
    return f"{before}{opening}{text}{closing}{after}"


def main() -> int:
    """Write card and picture."""
    path, points = FOLDER / "README.md", recorded_points()
    card = with_part(path.read_text(encoding="utf-8"), "extrapolation", extrapolated(points))
    if REPORT.is_file():
        try:
            part = in_the_engine(json.loads(REPORT.read_text(encoding="utf-8")))
        except ValueError as error:
            sys.stderr.write(f"{REPORT}: {error}\n")
            return 1
        card = with_part(card, "figures in the engine", part)
    path.write_text(card, encoding="utf-8")
    if not draw_curve(points, FOLDER / "curve.png", _COVERAGE):
        sys.stderr.write("the picture needs matplotlib\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
