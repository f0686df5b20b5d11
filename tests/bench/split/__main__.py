"""``make bench-split``: what drafts give, by where they come from and how far away that is.

First at this machine's own speed with one thread each for target and drafter, then on a clock that
runs as on GPUs (``clock``). The draft pool is a process of its own behind gRPC. It fails if a mode
changes a text or a bar is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from deployments.engine.config import SpeculationConfig, TorchEngineConfig
from deployments.engine.factory import build_engine
from deployments.engine.speculation.grpc_transport import grpc_connector
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.model_files import model_folder
from deployments.tokenizer import ChatTurn, Tokenizer
from tests.bench.split.bars import bars_of
from tests.bench.split.clock import PacedDrafter, Pair, ReplayRunner, features_of
from tests.bench.split.distance import Distance
from tests.bench.split.model import Measured, seconds_per_token
from tests.bench.split.modes import Mode, Modes, all_modes
from tests.bench.split.pool import SECRET, draft_pool, hosted, identity
from tests.bench.split.prompts import other_prompts, prompts
from tests.bench.split.race import Race
from tests.bench.split.report import draw, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.base import Engine
    from tests.bench.split.race import Tally

_FOLDER = Path("build/reports")
_PAIR = Pair(target_s=0.030, row_share=0.004, draft_s=0.002, head_s=0.0006)
"""Assumed, not measured: about a target of 70 B parameters, a drafter of 1 B on a GPU of its own,
and a head beside the target."""
_OWN_KEY, _PACED_KEY = bytes([1]) * 32, bytes([2]) * 32
"""Replayed prompts have pages of their own, so that every one is seen whole."""
_EARLIER_BATCH = 32
_POOL_MODES = (Mode.SYNC, Mode.PULL, Mode.PUSH, Mode.SPLIT)


class Bench:
    """One run.

    Args:
        told: the command line.
    """

    def __init__(self, told: argparse.Namespace) -> None:
        self._told = told
        self._cache_dir = default_cache_dir()
        prepare_builtin(self._cache_dir, _say)
        self._config = TorchEngineConfig(
            dtype=told.dtype,
            weights=told.weights,
            num_threads=1,
            max_batch_tokens=8192,
            speculation=SpeculationConfig(
                num_draft_tokens=told.draft_tokens, fanout=told.fanout, head=told.head
            ),
        )
        self._tokenizer = Tokenizer.load(model_folder(self._config.model, self._cache_dir))
        self._distance = Distance()
        connect = grpc_connector(identity(self._config, self._tokenizer), "bench", SECRET)
        vocab_size = self._tokenizer.vocab_size
        self._colocated = PacedDrafter(hosted(told.drafter, num_threads=1), 0.0)
        self._modes = Modes(
            all_modes(
                self._config.speculation, vocab_size, connect, self._distance, self._colocated
            )
        )
        self._prompts = {name: self._chats(texts) for name, texts in prompts().items()}
        self._others = {name: self._chats(texts) for name, texts in other_prompts().items()}

    async def run(self) -> list[dict[str, Any]]:
        """Measure everything.

        Returns:
            One row per kind of prompts, clock, batch, distance and mode.
        """
        engine = build_engine(
            self._config,
            cache_dir=self._cache_dir,
            page_store_factory=None,
            speculator=self._modes,
            detokenize=self._tokenizer.decode,
        )
        try:
            earlier = await self._earlier_outputs(engine)
            clocks = self._told.clocks
            rows = await self._at_own_speed(engine, earlier) if "own" in clocks else []
            if "simulated" in clocks:
                rows = await self._at_simulated_speed(engine, earlier) + rows
            return rows
        finally:
            await engine.close()

    async def _earlier_outputs(self, engine: Engine) -> list[tuple[int, ...]]:
        """What a tenant's local drafter has seen: answers to prompts that nobody asks later."""
        race = Race(engine, self._modes, "", _OWN_KEY)
        others = [prompt for texts in self._others.values() for prompt in texts]
        plain = await race.run(
            others,
            (Mode.PLAIN,),
            _EARLIER_BATCH,
            -(-len(others) // _EARLIER_BATCH),
            self._told.earlier_tokens,
        )
        texts = plain[Mode.PLAIN].texts[: len(others)]
        _say(f"the tenant had {sum(map(len, texts))} tokens of answers before")
        return texts

    async def _at_own_speed(
        self, engine: Engine, earlier: Sequence[Sequence[int]]
    ) -> list[dict[str, Any]]:
        rows = []
        with draft_pool(self._told.drafter, 0.0) as endpoint:
            race = Race(engine, self._modes, endpoint, _OWN_KEY, earlier)
            for name, texts in self._prompts.items():
                for batch in self._told.batches:
                    modes = (Mode.PLAIN, Mode.LOCAL, Mode.COLOCATED, Mode.CHAIN, Mode.SPLIT)
                    # Every prompt at least once.
                    repetitions = max(self._told.repetitions, -(-len(texts) // batch))
                    tallies = await race.run(texts, modes, batch, repetitions, self._told.tokens)
                    rows += [_row(name, "own", batch, 0.0, mode, tallies) for mode in modes[1:]]
                    _tell(rows, len(modes) - 1)
        return rows

    async def _at_simulated_speed(
        self, engine: Engine, earlier: Sequence[Sequence[int]]
    ) -> list[dict[str, Any]]:
        told = self._told
        chosen = {name: texts[: told.paced_prompts] for name, texts in self._prompts.items()}
        race = Race(engine, self._modes, "", _OWN_KEY)
        texts = []
        for own in chosen.values():
            written = await race.run(own, (Mode.PLAIN,), 1, len(own), told.tokens + 16)
            texts += [
                [*prompt, *text]
                for prompt, text in zip(own, written[Mode.PLAIN].texts, strict=True)
            ]
        pair = _PAIR.slowed(told.slow_down)
        core = engine._core  # type: ignore[attr-defined]
        features = []
        if core._head is not None:
            layers = core._head.capture_layers
            features = [features_of(core._runner, text, layers) for text in texts]
        core._runner = ReplayRunner(texts, self._tokenizer.vocab_size, pair, features)
        rows = []
        (self._modes.head or self._colocated).draft_s = pair.head_s
        with draft_pool(told.drafter, pair.draft_s) as endpoint:
            race = Race(engine, self._modes, endpoint, _PACED_KEY, earlier)
            for name, batch, round_trip in product(chosen, told.paced_batches, told.round_trips):
                own = chosen[name]
                self._distance.round_trip_s = round_trip * pair.target_s
                near = () if round_trip else (Mode.LOCAL, Mode.COLOCATED, Mode.CHAIN)
                modes = (Mode.PLAIN, *near, *_POOL_MODES)
                repetitions = max(1, len(own) // batch)
                tallies = await race.run(own, modes, batch, repetitions, told.tokens)
                found = [
                    _row(name, "simulated", batch, round_trip, mode, tallies) for mode in modes[1:]
                ]
                if batch == 1:
                    for row in found:
                        _compare(row, pair)
                rows += found
                _tell(rows, len(found))
        return rows

    def _chats(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            self._tokenizer.encode_chat([ChatTurn(role="user", content=text)]) for text in texts
        ]


def main() -> int:
    """Measure, print, write ``build/reports/split.json`` and ``split.png``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--clocks", nargs="+", default=("own", "simulated"), choices=("own", "simulated")
    )
    parser.add_argument(
        "--repetitions", type=int, default=4, help="at this machine's speed, at least"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--weights", default="file", choices=("dense", "file"))
    parser.add_argument("--drafter", default="student", help="as draft.drafter")
    parser.add_argument(
        "--head", help="folder of an EAGLE-3 head for the modes beside the target, not the drafter"
    )
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--fanout", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument(
        "--earlier-tokens", type=int, default=160, help="of each answer that the tenant had before"
    )
    parser.add_argument("--batches", type=int, nargs="*", default=(1, 2, 4, 8, 16, 32))
    parser.add_argument(
        "--round-trips", type=float, nargs="*", default=(0.0, 0.25, 0.5, 1.0, 2.0), help="in T"
    )
    parser.add_argument("--paced-prompts", type=int, default=4, help="of each kind")
    parser.add_argument(
        "--paced-batches", type=int, nargs="*", default=(1, 4), help="on the simulated clock"
    )
    parser.add_argument("--slow-down", type=float, default=6.0, help="of the simulated clock")
    told = parser.parse_args()
    rows = asyncio.run(Bench(told).run())
    bars = bars_of(rows)
    _FOLDER.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": platform.platform(),
        "options": vars(told),
        "rows": rows,
        "bars": {
            bar.title: {"value": bar.value, "bar": bar.least, "holds": bar.holds} for bar in bars
        },
    }
    (_FOLDER / "split.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(rows, _FOLDER / "split.png")
    show(rows, bars)
    return 0 if all(bar.holds for bar in bars) else 2


def _row(
    name: str, clock: str, batch: int, round_trip: float, mode: Mode, tallies: dict[Mode, Tally]
) -> dict[str, Any]:
    own, plain = tallies[mode], tallies[Mode.PLAIN]
    hits, misses = own.total("num_table_hits"), own.total("num_table_misses")
    pairs = list(zip(plain.seconds_per_token, own.seconds_per_token, strict=True))
    histograms = [answer.stats.acceptance_histogram for answer in own.answers]
    return {
        "prompts": name,
        "clock": clock,
        "batch": batch,
        "round_trip": round_trip,
        "mode": mode.value,
        "tokens_per_s": 1 / fmean(own.seconds_per_token),
        # Of the time for all prompts, which differ much; the median says more of what is the same.
        "speed_up": sum(plain.seconds_per_token) / sum(own.seconds_per_token),
        "median_speed_up": median(theirs / mine for theirs, mine in pairs),
        "model_speed_up": None,
        "against_model": None,
        "same_text": own.texts == plain.texts,
        "tokens_per_step": own.tokens_per_step,
        "spec_steps": own.total("num_spec_steps"),
        "drafted": own.total("num_draft_tokens"),
        "accepted": own.total("num_accepted_draft_tokens"),
        "accepted_from_pool": own.total("num_accepted_pool_tokens"),
        "accepted_from_head": own.total("num_accepted_head_tokens"),
        "table_hit_rate": hits / (hits + misses) if hits + misses else None,
        "steps": sum(answer.num_steps for answer in own.answers),
        "stall_p50_ms": 1e3 * median(own.stalls_s) if own.stalls_s else 0.0,
        "acceptance_histogram": _summed(histograms),
        "samples": own.seconds_per_token,
    }


def _compare(row: dict[str, Any], pair: Pair) -> None:
    num_spec_steps = row["spec_steps"]
    if not num_spec_steps:
        return
    measured = Measured(
        hit_rate=min(1.0, num_spec_steps / row["steps"]),
        tokens_per_hit=1 + row["accepted"] / num_spec_steps,
        draft_length=row["drafted"] / num_spec_steps,
    )
    round_trip_s = row["round_trip"] * pair.target_s
    expected = seconds_per_token(Mode(row["mode"]), pair, round_trip_s, measured)
    row["model_speed_up"] = pair.target_s / expected
    row["against_model"] = row["speed_up"] / row["model_speed_up"]


def _summed(histograms: Sequence[Sequence[int]]) -> list[int]:
    length = max((len(each) for each in histograms), default=0)
    return [sum(each[depth] for each in histograms if depth < len(each)) for depth in range(length)]


def _tell(rows: Sequence[dict[str, Any]], count: int) -> None:
    found = rows[-count:]
    first = found[0]
    place = f"{first['prompts']}, {first['clock']} clock, batch {first['batch']}"
    values = ", ".join(f"{row['mode']} {row['speed_up']:.2f}" for row in found)
    _say(f"{place}, r = {first['round_trip']:g} T: {values}")


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
