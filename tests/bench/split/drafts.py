"""``make bench-drafts``: what the shipped drafts are worth on MT-bench, at temperature 0 and 1.

The engine answers first questions plainly. Then it says the same again, on a clock slow
enough for every draft to be there in time: with the draft alone, asked behind every step (sync);
with copies of the text and of earlier outputs alone (local); with both, verified together (chain);
and as a pool serves them, one round ahead (split). Tokens per step are the mean acceptance length
(tau).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from deployments.engine.config import SpeculationConfig, TorchEngineConfig
from deployments.engine.factory import build_engine
from deployments.engine.speculation.grpc_transport import grpc_connector
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.model_files import model_folder
from deployments.tokenizer import ChatTurn, Tokenizer
from tests.bench.split.clock import Pair, ReplayRunner
from tests.bench.split.distance import Distance
from tests.bench.split.modes import Mode, Modes, all_modes
from tests.bench.split.pool import SECRET, draft_pool, hosted, identity
from tests.bench.split.prompts import mt_bench
from tests.bench.split.race import Race

if TYPE_CHECKING:
    from collections.abc import Sequence

_FOLDER = Path("build/reports")
_PLAIN_KEY = bytes([1]) * 32
_OTHERS = Path("deployments/engine/torch_engine/data/student_prompts.txt")
_BATCH = 8
_SPARE_TOKENS = 16
_BARS = {Mode.SYNC: 1.6, Mode.CHAIN: 1.75}
"""Tokens per step with three draft tokens, greedy: the draft alone, and all together."""


async def measure(told: argparse.Namespace, before: Sequence[str]) -> list[dict[str, Any]]:
    """One row per temperature and mode.

    Args:
        before: prompts whose answers the local drafter has seen.
    """
    cache_dir = default_cache_dir()
    prepare_builtin(cache_dir, _say)
    config = TorchEngineConfig(
        dtype="bfloat16",
        weights="file",
        num_threads=told.threads,
        num_pages=1024,
        max_batch_tokens=8192,
        speculation=SpeculationConfig(num_draft_tokens=told.draft_tokens, fanout=told.fanout),
    )
    tokenizer = Tokenizer.load(model_folder(config.model, cache_dir))
    connect = grpc_connector(identity(config, tokenizer), "bench", SECRET)
    # A clock that stands still says nothing of costs, so all that is at hand is verified.
    modes = Modes(
        all_modes(
            config.speculation,
            tokenizer.vocab_size,
            connect,
            Distance(),
            hosted("student", 1),
            lambda: 0.0,
        )
    )

    def chats(texts: Sequence[str]) -> list[list[int]]:
        return [tokenizer.encode_chat([ChatTurn(role="user", content=text)]) for text in texts]

    asked = chats(mt_bench()[: told.questions])
    others = chats(before)
    engine = build_engine(
        config,
        cache_dir=cache_dir,
        page_store_factory=None,
        speculator=modes,
        detokenize=tokenizer.decode,
    )
    core = engine._core  # type: ignore[attr-defined]
    runner = core._runner
    rows = []
    try:
        race = Race(engine, modes, "", _PLAIN_KEY)
        num_tokens = told.tokens + _SPARE_TOKENS
        told_before = await race.run(
            others, (Mode.PLAIN,), _BATCH, -(-len(others) // _BATCH), told.tokens
        )
        earlier = told_before[Mode.PLAIN].texts[: len(others)]
        with draft_pool("student") as endpoint:
            for number, temperature in enumerate((0.0, 1.0)):
                core._runner = runner
                repetitions = -(-len(asked) // _BATCH)
                plain = await race.run(
                    asked, (Mode.PLAIN,), _BATCH, repetitions, num_tokens, (temperature,)
                )
                written = plain[Mode.PLAIN].texts[: len(asked)]
                texts = [[*a, *b] for a, b in zip(asked, written, strict=True)]
                _say(f"temperature {temperature:g}: {len(texts)} answers are written")
                pair = Pair(target_s=told.step_seconds, row_share=0.0, draft_s=0.0, head_s=0.0)
                core._runner = ReplayRunner(texts, tokenizer.vocab_size, pair)
                key = bytes([2 + number]) * 32
                again = Race(engine, modes, endpoint, key, earlier)
                for mode in (Mode.SYNC, Mode.LOCAL, Mode.CHAIN, Mode.SPLIT):
                    tallies = await again.run(
                        asked, (mode,), _BATCH, repetitions, told.tokens, (temperature,)
                    )
                    tally = tallies[mode]
                    accepted = tally.total("num_accepted_draft_tokens")
                    rows.append(
                        {
                            "temperature": temperature,
                            "mode": mode.value,
                            "tokens_per_step": tally.tokens_per_step,
                            "from_pool": tally.total("num_accepted_pool_tokens") / max(1, accepted),
                            "same_text": [
                                text == whole[: told.tokens]
                                for text, whole in zip(tally.texts, written, strict=False)
                            ].count(True)
                            / len(written),
                        }
                    )
                    _say(f"{mode.value}: {rows[-1]['tokens_per_step']:.3f} tokens a step")
    finally:
        await engine.close()
    return rows


def main() -> int:
    """Measure, print, write ``build/reports/drafts.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--fanout", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of the target")
    parser.add_argument("--step-seconds", type=float, default=0.15, help="of the slow clock")
    told = parser.parse_args()
    rows = asyncio.run(measure(told, _OTHERS.read_text(encoding="utf-8").splitlines()))
    _FOLDER.mkdir(parents=True, exist_ok=True)
    bars = [
        {"mode": mode.value, "value": row["tokens_per_step"], "bar": bar}
        for mode, bar in _BARS.items()
        for row in rows
        if row["mode"] == mode.value and row["temperature"] == 0 and told.draft_tokens == 3
    ]
    report = {"options": vars(told), "rows": rows, "bars": bars}
    (_FOLDER / "drafts.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"tokens a step commits with {told.draft_tokens} draft tokens, MT-bench")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()))
    console = Console(width=120)
    console.print(table)
    holds = all(bar["value"] >= bar["bar"] for bar in bars)
    for bar in bars:
        word = "holds" if bar["value"] >= bar["bar"] else "FAILS"
        console.print(f"{word}  {bar['value']:.3f} (bar {bar['bar']:g})  {bar['mode']}, greedy")
    return 0 if holds and all(row["same_text"] == 1 for row in rows) else 2


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
