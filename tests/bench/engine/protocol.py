"""How the benchmark talks to a contestant in its own process. Standard library only.

The child writes one line of JSON when it is ready, then one line per question. Everything a library
prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KV_TOKENS = 8192
"""Tokens whose keys and values a contestant has memory for."""
MAX_MODEL_LEN = 4608
MAX_BATCH_TOKENS = 1024
MAX_NUM_SEQS = 32


class Block(NamedTuple):
    """A piece of memory that holds keys and values."""

    address: int
    num_bytes: int


class Contestant(Protocol):
    """A loaded model. A method that is missing, or answers None, is something it cannot do."""

    version: str

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> tuple[float, float]:
        """Answer greedily, never ending early.

        Returns:
            Seconds until every prompt has its first token, and seconds per step after that.
        """

    def arrivals(
        self, prompts: list[list[int]], interval_s: float, num_new_tokens: int
    ) -> list[float]:
        """Answer requests that come one after the other, whether earlier ones are done or not.

        Returns:
            For each request the seconds from its arrival to its first token.
        """

    def forward(self, context: int, num_tokens: int) -> float:
        """Seconds of one forward of ``num_tokens`` behind ``context`` tokens of one sequence."""

    def kv_blocks(self) -> list[Block]:
        """Where keys and values lie for good."""


def prompt(length: int, seed: int) -> list[int]:
    """Token ids that no other seed shares a prefix with."""
    return [(7919 * seed + 104_729 * place + 13) % 40_000 + 100 for place in range(length)]


def serve(load: Callable[[], Contestant]) -> None:
    """Load the contestant and answer until stdin ends; what it cannot do is answered with null."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    contestant = load()
    channel.write(json.dumps({"version": contestant.version}) + "\n")
    for line in sys.stdin:
        question = json.loads(line)
        method = getattr(contestant, question.pop("do"), None)
        answer = None if method is None else method(**question)
        kv_blocks = contestant.kv_blocks() if hasattr(contestant, "kv_blocks") else []
        reply = {
            "answer": answer,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "resident_mb": (_resident_bytes() - _present_bytes(kv_blocks)) / (1 << 20),
        }
        channel.write(json.dumps(reply) + "\n")


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - one line
        return int(file.read().split()[1]) * resource.getpagesize()


def _present_bytes(blocks: Sequence[Block]) -> int:
    """How much of these blocks lies in memory; pools are often larger than what was ever used."""
    page = resource.getpagesize()
    total = 0
    with open("/proc/self/pagemap", "rb") as file:  # noqa: PTH123 - one line
        for block in blocks:
            first, last = block.address // page, (block.address + block.num_bytes) // page
            file.seek(8 * first)
            entries = file.read(8 * (last - first))
            total += sum(entry >> 63 for (entry,) in struct.iter_unpack("<Q", entries)) * page
    return total
