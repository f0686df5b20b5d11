"""A picture of a training's quality that is drawn anew after every evaluation."""

from __future__ import annotations

import json
import time
from threading import Lock
from typing import TYPE_CHECKING, Any

from cluster.draft_curve import CurvePoint, draw_curve

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_PICTURE = "curve.png"
_PERIOD_S = 20.0


class LiveCurve:
    """Passes on what a training says, and looks whether that was an evaluation.

    Where the training runs does not matter: it writes its points to a file before it speaks.
    """

    def __init__(
        self,
        folder: Path,
        on_progress: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch a job.

        Args:
            folder: of the job; gets ``curve.png``, where matplotlib is installed.
            on_progress: told every line.
            clock: in seconds; a picture takes a second, so they are as rare as one in twenty.
        """
        self._points = folder / "curve.jsonl"
        self._picture = folder / _PICTURE
        self._on_progress = on_progress
        self._clock = clock
        self._drawn = b""
        self._drawn_at = clock()
        # Answers may be told of by another thread.
        self._lock = Lock()

    def __call__(self, line: str) -> None:
        """One line."""
        with self._lock:
            self._draw()
        self._on_progress(line)

    def _draw(self) -> None:
        if self._clock() - self._drawn_at < _PERIOD_S:
            return
        written = self._points.read_bytes() if self._points.is_file() else b""
        # A file that is being written ends within a line.
        whole = written[: written.rfind(b"\n") + 1]
        if not whole or whole == self._drawn:
            return
        self._drawn, self._drawn_at = whole, self._clock()
        try:
            rows = [json.loads(row) for row in whole.splitlines()]
            ceiling = rows[-1]["quality"]["coverage"]
            draw_curve([_point(row) for row in rows], self._picture, ceiling)
        except (OSError, ValueError, KeyError) as error:
            # A training of hours does not end for want of a picture.
            self._on_progress(f"warning: {self._picture.name} is not drawn: {error!r}")


def _point(row: dict[str, Any]) -> CurvePoint:
    quality = row["quality"]
    return CurvePoint(
        row["num_tokens"],
        tuple(quality["acceptance"]),
        dict(enumerate(quality["mean_acceptance_length"], start=1)),
        quality["tree_acceptance_length"],
    )
