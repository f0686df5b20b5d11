"""``make bench-kv-trace``: how many prompt tokens an SSD tier of each size would have given.

Replays the prompts of Mooncake's public conversation trace (``tests/data``), block by block,
through the eviction in use, through LRU, and through a cache without bound. A prompt takes the
longest prefix that is held, as ``ChainLoader`` does, and then writes the rest. Prints a table, and
writes ``build/reports/kv_trace.json`` and ``kv_trace.png``. Nothing here is random or timed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.kv.eviction import LeastRecentlyUsed, SimulatedLog, Unbounded
from tests.bench.kv.table import print_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.bench.kv.eviction import Cache

TRACE = Path("tests/data/mooncake_conversation.txt")
REPORT = Path("build/reports/kv_trace.json")
BLOCK_TOKENS = 512
SHARES = (0.005, 0.01, 0.02, 0.035, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Sizes of the tier, of all distinct blocks of the trace."""
NUM_SEGMENTS = 32
"""Files of the tier, as 8 GiB in files of 256 MiB."""
LARGE_SHARE = 0.3
MAX_LOSS = 0.02
PAGE_TOKENS, RAW_PAGE_BYTES = 64, 1_474_560  # of SmolLM2-135M in bfloat16


class Prompt(NamedTuple):
    """One request of the trace."""

    num_tokens: int
    blocks: tuple[int, ...]


def read_trace(lines: Iterable[str]) -> list[Prompt]:
    """All prompts, in order."""
    prompts: list[Prompt] = []
    for line in lines:
        num_tokens, runs = line.split(":")
        blocks: list[int] = []
        for run in runs.split():
            first, _, count = run.partition("+")
            blocks.extend(range(int(first), int(first) + int(count or 1)))
        prompts.append(Prompt(int(num_tokens), tuple(blocks)))
    return prompts


def replay(prompts: Sequence[Prompt], cache: Cache) -> float:
    """The share of all prompt tokens that the cache gave."""
    num_hit = 0
    for prompt in prompts:
        depth = 0
        while depth < len(prompt.blocks) and cache.read(prompt.blocks[depth]):
            depth += 1
        num_hit += min(prompt.num_tokens, depth * BLOCK_TOKENS)
        for block in prompt.blocks[depth:]:
            cache.write(block)
    return num_hit / sum(prompt.num_tokens for prompt in prompts)


def measure(prompts: Sequence[Prompt], shares: Sequence[float]) -> dict[str, Any]:
    """Hit rates by size, and the bound."""
    num_distinct = len({block for prompt in prompts for block in prompt.blocks})
    bound = replay(prompts, Unbounded())
    rows: list[dict[str, Any]] = []
    for share in shares:
        num_blocks = max(NUM_SEGMENTS, int(num_distinct * share))
        log = SimulatedLog(num_blocks, num_blocks // NUM_SEGMENTS)
        hit_rate = replay(prompts, log)
        rows.append(
            {
                "share": share,
                "gib_raw": num_blocks * (BLOCK_TOKENS // PAGE_TOKENS) * RAW_PAGE_BYTES / (1 << 30),
                "hit_rate": hit_rate,
                "lru": replay(prompts, LeastRecentlyUsed(num_blocks)),
                "bound": bound,
                "blocks_written": log.num_writes,
            }
        )
    return {
        "trace": str(TRACE),
        "num_prompts": len(prompts),
        "num_tokens": sum(prompt.num_tokens for prompt in prompts),
        "num_distinct_blocks": num_distinct,
        "sizes": rows,
        "bars": hold_bars(rows),
    }


def hold_bars(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The bound is reached by a tier that is large enough, and LRU is not far ahead anywhere."""
    large = [row["bound"] - row["hit_rate"] for row in rows if row["share"] >= LARGE_SHARE]
    behind = [row["lru"] - row["hit_rate"] for row in rows]
    return {
        f"loss against the bound, from {LARGE_SHARE} of all blocks on": {
            "value": max(large),
            "bar": MAX_LOSS,
            "holds": max(large) <= MAX_LOSS,
        },
        "behind LRU at any size": {
            "value": max(behind),
            "bar": MAX_LOSS,
            "holds": max(behind) <= MAX_LOSS,
        },
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    shares = [row["share"] for row in report["sizes"]]
    for name, label in (("hit_rate", "segment log"), ("lru", "LRU")):
        axes.plot(shares, [row[name] for row in report["sizes"]], marker="o", label=label)
    axes.axhline(report["sizes"][0]["bound"], color="grey", ls="--", label="without bound")
    axes.set_xscale("log")
    axes.set_xlabel("size of the tier, of all distinct blocks")
    axes.set_ylabel("prompt tokens that were there")
    axes.set_title("Mooncake conversation trace")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Replay, report; 1 if a bar does not hold."""
    with TRACE.open(encoding="utf-8") as lines:
        report = measure(read_trace(lines), SHARES)
    print_table("Prompt tokens found, by size of the tier", report["sizes"])
    print_table("Bars", [{"name": name} | bar for name, bar in report["bars"].items()])
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, REPORT.with_suffix(".png"))
    sys.stdout.write(f"written: {REPORT} and {REPORT.with_suffix('.png')}\n")
    return 0 if all(bar["holds"] for bar in report["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
