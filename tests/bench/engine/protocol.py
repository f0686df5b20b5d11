"""How the benchmark talks to a contestant in its own process. Standard library only.

The child writes one line of JSON when it is ready, then one line per question. Everything a library
prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from typing import Any, Protocol


class Contestant(Protocol):
    """A loaded model."""

    version: str

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> tuple[float, float]:
        """Answer greedily, never ending early.

        Returns:
            Seconds until every prompt has its first token, and seconds per step after that.
        """

    def forward(self, context: int, num_tokens: int) -> float:
        """Seconds of one forward of ``num_tokens`` behind ``context`` tokens of one sequence."""


def prompt(length: int, seed: int) -> list[int]:
    """Token ids that no other seed shares a prefix with."""
    return [(7919 * seed + 104_729 * place + 13) % 40_000 + 100 for place in range(length)]


def serve(load: Any) -> None:
    """Load the contestant and answer until stdin ends; what it cannot do is answered with null."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    contestant: Contestant = load()
    say = {
        "version": contestant.version,
        "startup_s": time.perf_counter() - started,
        "resident_mb": _resident_mb(),
    }
    channel.write(json.dumps(say) + "\n")
    for line in sys.stdin:
        question = json.loads(line)
        name = question.pop("do")
        method = getattr(contestant, name, None)
        answer = None if method is None else method(**question)
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        channel.write(json.dumps({"answer": answer, "peak_mb": peak_mb}) + "\n")


def _resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - one line
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
