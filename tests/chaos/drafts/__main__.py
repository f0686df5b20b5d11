"""``make chaos-drafts``: drafters die, freeze, are cut off and exchanged while requests run.

One target engine with the default model, and draft replicas in processes of their own behind gRPC,
first one, then two. The target steps no faster than told: on a CPU every verified row costs time,
and the budget would use few tables. What stands between them in a cluster is the real code, all but
Serve: a stand-in offers the replicas that live. Prints tables, writes a picture and
``build/reports/chaos_drafts.json``; 2 if a bar does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deployments.draft_sessions import DraftSessions
from deployments.engine.config import SpeculationConfig, TorchEngineConfig
from deployments.engine.factory import build_engine
from deployments.engine.speculation.grpc_transport import grpc_connector
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.engine.types import GenerationRequest, SamplingParams
from deployments.model_files import model_folder
from deployments.tokenizer import ChatTurn, Tokenizer
from tests.bench.kv.table import print_table
from tests.bench.split.pool import SECRET, identity
from tests.bench.split.prompts import mt_bench
from tests.chaos.drafts.drills import faults, run_drill
from tests.chaos.drafts.load import Answer, Load
from tests.chaos.drafts.paced import PacedRunner
from tests.chaos.drafts.replicas import Pool, Replica
from tests.chaos.drafts.report import bars_of, draw

_FOLDER = Path("build/reports")
_WARM_UP_S = 2.0


class Chaos:
    """One run.

    Args:
        told: the command line.
    """

    def __init__(self, told: argparse.Namespace) -> None:
        self._told = told
        self._cache_dir = default_cache_dir()
        prepare_builtin(self._cache_dir, _say)
        self._config = TorchEngineConfig(
            weights="file",
            deterministic=True,  # so that texts are compared without excuses
            num_threads=1,
            max_num_seqs=16,
            speculation=SpeculationConfig(local_drafter=told.local),
        )
        self._tokenizer = Tokenizer.load(model_folder(self._config.model, self._cache_dir))
        self._sessions: DraftSessions | None = None
        self._speculator = SplitSpeculator(
            self._config.speculation,
            vocab_size=self._tokenizer.vocab_size,
            connect=grpc_connector(identity(self._config, self._tokenizer), "chaos", SECRET),
            on_link_lost=self._on_link_lost,
        )
        self.plain_tokens_per_s = 0.0
        self.rows: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.wrong: list[str] = []
        self.num_answers = 0

    async def run(self) -> None:
        """Measure everything."""
        engine = build_engine(
            self._config,
            cache_dir=self._cache_dir,
            page_store_factory=None,
            speculator=self._speculator,
            detokenize=self._tokenizer.decode,
        )
        core = engine._core  # type: ignore[attr-defined]
        core._runner = PacedRunner(core._runner, self._told.step_seconds)
        load = Load(engine, self._speculator, self._requests(), self._told.clients)
        try:
            _say("writing the texts that are expected")
            expected = await load.once()
            self.plain_tokens_per_s = await self._plain(load)
            _say(f"plain decoding: {self.plain_tokens_per_s:.1f} tokens/s")
            for num_replicas in self._told.replicas:
                await self._with_pool(load, num_replicas)
        finally:
            await engine.close()
        self._judge(expected, load.answers)

    async def _plain(self, load: Load) -> float:
        load.start(None)
        await asyncio.sleep(_WARM_UP_S + 2 * self._told.calm_seconds)
        await load.stop()
        warm = load.samples[0].at + _WARM_UP_S
        samples = [sample for sample in load.samples if sample.at >= warm]
        first, last = samples[0], samples[-1]
        return (last.num_tokens - first.num_tokens) / (last.at - first.at)

    async def _with_pool(self, load: Load, num_replicas: int) -> None:
        with ExitStack() as stack:
            replicas = []
            for number in range(num_replicas):
                name = f"draft-{number}"
                replicas.append(await asyncio.to_thread(Replica, name, self._told.drafter))
                stack.callback(replicas[-1].stop)
            self._sessions = DraftSessions(Pool(replicas), self._speculator)
            load.start(self._sessions)
            try:
                for name, fault in faults(self._told.seconds).items():
                    if name not in self._told.faults:
                        continue
                    row = await run_drill(name, fault, load, replicas, self._told.calm_seconds)
                    self.rows.append(row)
                    _say(f"{name}, {num_replicas} replica(s): back after {row['recovery_s']} s")
            finally:
                await load.stop()
                await self._sessions.close()

    def _requests(self) -> list[GenerationRequest]:
        chats = [
            self._tokenizer.encode_chat([ChatTurn(role="user", content=text)])
            for text in mt_bench()[: self._told.prompts]
        ]
        return [
            GenerationRequest(
                request_id=f"request-{number}",
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(
                    max_tokens=self._told.tokens, temperature=float(number % 2), seed=100 + number
                ),
            )
            for number, prompt in enumerate(chats)
        ]

    def _judge(self, expected: list[Answer], answers: list[Answer]) -> None:
        texts = {answer.request.request_id: answer.token_ids for answer in expected}
        self.num_answers = len(answers)
        for answer in (*expected, *answers):
            if answer.error:
                self.errors.append(answer.error)
                continue
            name = answer.request.request_id
            if answer.token_ids != texts[name]:
                self.wrong.append(f"{name}: {answer.token_ids}, not {texts[name]}")

    def _on_link_lost(self, endpoint: str) -> None:
        if self._sessions is not None:
            self._sessions.link_lost(endpoint)


def main() -> int:
    """Break things, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="*", default=(1, 2))
    parser.add_argument("--faults", nargs="*", default=tuple(faults(0.0)), choices=faults(0.0))
    parser.add_argument("--seconds", type=float, default=8.0, help="that a fault lasts")
    parser.add_argument("--calm-seconds", type=float, default=6.0, help="before each")
    parser.add_argument(
        "--step-seconds", type=float, default=0.1, help="of the target, however many rows it has"
    )
    parser.add_argument("--clients", type=int, default=4, help="requests at a time")
    parser.add_argument("--prompts", type=int, default=16, help="of MT-bench")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at most")
    parser.add_argument("--drafter", default="student", help="as draft.drafter")
    parser.add_argument(
        "--local", default="none", choices=("none", "suffix"), help="drafter of the target's own"
    )
    told = parser.parse_args()
    chaos = Chaos(told)
    began = time.monotonic()
    asyncio.run(chaos.run())
    bars = bars_of(chaos.rows, chaos.plain_tokens_per_s, len(chaos.errors), len(chaos.wrong))
    report = {
        "machine": platform.platform(),
        "options": vars(told),
        "seconds": time.monotonic() - began,
        "answers": chaos.num_answers,
        "plain_tokens_per_s": chaos.plain_tokens_per_s,
        "rows": chaos.rows,
        "errors": chaos.errors + chaos.wrong,
        "bars": bars,
    }
    _FOLDER.mkdir(parents=True, exist_ok=True)
    path = _FOLDER / "chaos_drafts.json"
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if chaos.rows:
        draw(chaos.rows, chaos.plain_tokens_per_s, _FOLDER / "chaos_drafts.png")
    hidden = ("samples", "how")
    print_table(
        "Faults of draft replicas under load",
        [{name: row[name] for name in row if name not in hidden} for row in chaos.rows],
    )
    print_table("Bars", [{"name": name} | bar for name, bar in bars.items()])
    for error in report["errors"]:
        _say(error)
    sys.stdout.write(f"written: {path}\n")
    return 0 if all(bar["holds"] for bar in bars.values()) else 2


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
