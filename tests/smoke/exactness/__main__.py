"""``make exactness``: speculative text is plain text, on MT-bench, whatever drafts come from.

The default model in deterministic bfloat16, so that every token must be the same. The reference is
each question answered alone and plainly; budgets are random.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table

from deployments.engine.config import DEFAULT_MODEL, SpeculationConfig, TorchEngineConfig
from deployments.engine.factory import build_engine
from deployments.engine.speculation.grpc_transport import grpc_connector
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.model_files import model_folder
from deployments.tokenizer import ChatTurn, Tokenizer
from tests.bench.split.distance import Distance
from tests.bench.split.modes import Mode, Modes, all_modes
from tests.bench.split.pool import SECRET, draft_pool, identity
from tests.bench.split.prompts import mt_bench
from tests.bench.split.race import Race
from tests.heads import write_heads
from tests.smoke.exactness.hostile import TEXTS_VARIABLE, HalfOracle, RandomClock, RandomTrees

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.bench.split.race import Tally

_KEY = bytes(32)
_DRAFTED = [mode for mode in Mode if mode is not Mode.PLAIN]
_WITH_POOL = {Mode.SYNC, Mode.PULL, Mode.PUSH, Mode.SPLIT}
_ORACLE = f"{HalfOracle.__module__}:{HalfOracle.__name__}"


class Result(NamedTuple):
    """Of one mode, batch and temperature."""

    mode: str
    pool: str
    temperature: float
    batch: int
    num_equal: int
    num_asked: int
    num_drafted: int
    num_accepted: int

    @property
    def holds(self) -> bool:
        """All texts are equal, and drafts were right and wrong."""
        return self.num_equal == self.num_asked and 0 < self.num_accepted < self.num_drafted


async def _run(told: argparse.Namespace, folder: Path) -> list[Result]:
    cache_dir = default_cache_dir()
    prepare_builtin(cache_dir, _say)
    tokenizer = Tokenizer.load(model_folder(DEFAULT_MODEL, cache_dir))
    asked = [
        tokenizer.encode_chat([ChatTurn(role="user", content=text)])
        for text in mt_bench()[: told.questions]
    ]
    head = told.head or str(folder / "fitted")
    if told.head is None:
        write_heads(cache_dir, asked, random=folder / "random", fitted=folder / "fitted")
    config = TorchEngineConfig(
        dtype="bfloat16",
        weights="file",
        deterministic=True,
        num_threads=1,
        max_num_seqs=8,
        speculation=SpeculationConfig(num_draft_tokens=told.draft_tokens, head=head),
    )
    connect = grpc_connector(identity(config, tokenizer), "exactness", SECRET)
    trees = RandomTrees(tokenizer.vocab_size, seed=told.seed)
    speculators = all_modes(
        config.speculation,
        tokenizer.vocab_size,
        connect,
        Distance(),
        clock=RandomClock(told.seed),
    )
    # A head that seems to take as long as a step is hardly asked; here all it drafts is verified.
    eager = SplitSpeculator(
        config.speculation.model_copy(update={"local_drafter": "none"}),
        vocab_size=tokenizer.vocab_size,
        clock=lambda: 0.0,
    )
    modes = Modes({**speculators, Mode.COLOCATED: eager, Mode.TREES: trees})
    engine = build_engine(
        config,
        cache_dir=cache_dir,
        page_store_factory=None,
        speculator=modes,
        detokenize=tokenizer.decode,
    )
    results: list[Result] = []

    async def compare(
        endpoint: str, drafter: str, drafted: Sequence[Mode], temperature: float
    ) -> None:
        race = Race(engine, modes, endpoint, _KEY)
        for batch in (1, 8):
            for mode in drafted:
                num_rounds = len(asked) // batch
                tallies = await race.run(
                    asked, (mode,), batch, num_rounds, told.tokens, (temperature,)
                )
                results.append(_result(tallies[mode], texts, mode, drafter, temperature, batch))
                _say(str(results[-1]))

    try:
        for temperature in told.temperatures:
            race = Race(engine, modes, "", _KEY)
            plain = await race.run(asked, (Mode.PLAIN,), 1, len(asked), told.tokens, (temperature,))
            texts = plain[Mode.PLAIN].texts
            trees.texts = [[*prompt, *text] for prompt, text in zip(asked, texts, strict=True)]
            with NamedTemporaryFile("w", suffix=".json") as file:
                file.write(json.dumps(trees.texts))
                file.flush()
                os.environ[TEXTS_VARIABLE] = file.name
                with draft_pool(_ORACLE) as endpoint:
                    await compare(endpoint, "oracle", _DRAFTED, temperature)
            with draft_pool("student") as endpoint:
                await compare(endpoint, "student", (Mode.SYNC, Mode.SPLIT), temperature)
    finally:
        await engine.close()
    return results


def _result(
    tally: Tally,
    texts: Sequence[tuple[int, ...]],
    mode: Mode,
    drafter: str,
    temperature: float,
    batch: int,
) -> Result:
    pairs = zip(tally.texts, texts, strict=False)
    return Result(
        mode=mode.value,
        pool=drafter if mode in _WITH_POOL else "-",
        temperature=temperature,
        batch=batch,
        num_equal=sum(own == plain for own, plain in pairs),
        num_asked=len(tally.texts),
        num_drafted=tally.total("num_draft_tokens"),
        num_accepted=tally.total("num_accepted_draft_tokens"),
    )


def main() -> int:
    """Compare, print, and fail if a text differs or nothing was compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=56)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--temperatures", type=float, nargs="*", default=(0.0, 1.0))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--head", help="folder of an EAGLE-3 head; by default one is fitted to the questions"
    )
    with TemporaryDirectory() as folder:
        results = asyncio.run(_run(parser.parse_args(), Path(folder)))
    table = Table(title="texts that equal plain decoding's, to the token")
    for name in (*Result._fields, "holds"):
        table.add_column(name.removeprefix("num_"), justify="right")
    for result in results:
        table.add_row(*(str(value) for value in result), "yes" if result.holds else "NO")
    Console(width=120).print(table)
    return 0 if all(result.holds for result in results) else 1


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
