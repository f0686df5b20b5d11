"""``make demo-refresh``: a better draft takes over a cluster that serves; a worse one does not.

The default model starts with a weak draft, solved for on some hundred tokens. While clients go on
asking, the draft that comes with the package is put on trial and must be promoted; then one of
random weights is, and must be rolled back. Every answer must have the text of plain decoding, to
the bit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from cluster.commands.status import _drafters
from cluster.config import ClusterConfig, ServerConfig
from cluster.console import err, fail, out, steps
from cluster.demo.clients import DemoClients
from cluster.draft_refresh import offer
from cluster.errors import ClusterError
from cluster.local_cluster import LocalCluster
from cluster.metrics_reader import MetricsSnapshot
from cluster.serve_app import paceline_app
from cluster.signals import StopRequestedError, stop_on_signals
from cluster.training_prompts import read_prompts
from deployments.config import DraftPoolConfig, IngressConfig, TrafficLogConfig
from deployments.engine.config import CanaryConfig, SpeculationConfig, TorchEngineConfig
from deployments.engine.torch_engine.prompts import bundled_prompts
from deployments.engine.torch_engine.student import (
    find_student,
    read_student,
    save_student,
    write_student,
)
from deployments.engine.torch_engine.student_fitting import fit_student
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir, load_model
from deployments.tokenizer import Tokenizer
from tests.bench.split.prompts import mt_bench
from tests.smoke.refresh.load import Asked, SteadyLoad

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.state import ClusterState
    from deployments.engine.torch_engine.student import StudentWeights

_ENDS = ("promoted", "rolled back")
_REPORT = Path("build/reports/refresh.json")
_TEMPERATURES = (0.0, 0.8)
_POLL_S = 0.2
_METRICS_TIMEOUT_S = 30.0


def _config(model: Path, folder: Path, told: argparse.Namespace) -> ClusterConfig:
    """One target, one draft replica with a weak student; texts are equal to the bit."""
    return ClusterConfig(
        cache_dir=folder / "cache",
        engine=TorchEngineConfig(
            model=str(model),
            deterministic=True,
            # What the pool is worth shows best where nothing else drafts, and where tables are
            # small enough to be there in time on two busy cores.
            speculation=SpeculationConfig(num_draft_tokens=2, fanout=1, local_drafter="none"),
        ),
        draft=DraftPoolConfig(
            canary=CanaryConfig(
                share=0.5,
                min_sessions=told.min_sessions,
                min_rounds=told.min_rounds,
                max_sessions=1000,
            )
        ),
        kv=None,
        ingress=IngressConfig(
            traffic_log=TrafficLogConfig(tenants=("default",), folder=folder / "traffic")
        ),
        server=ServerConfig(http_port=0, grpc_port=0),
    )


def _random(student: StudentWeights) -> StudentWeights:
    """The same file with a connector that was never fitted."""
    weight = torch.randn(student.connector_weight.shape, generator=torch.Generator().manual_seed(1))
    return replace(student, connector_weight=weight / weight.shape[0] ** 0.5)


def run(told: argparse.Namespace, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """The whole demo; the report holds nothing that was not measured."""
    started = time.monotonic()
    model = prepare_builtin(default_cache_dir(), on_progress)
    with tempfile.TemporaryDirectory(prefix="paceline-refresh-") as name:
        folder = Path(name)
        config = _config(model, folder, told)
        on_progress("solving for a weak draft")
        target = load_model(str(model), dtype="bfloat16", cache_dir=config.cache_dir)
        shipped = find_student(config.cache_dir, target.weights_digest)
        weak = fit_student(
            target, bundled_prompts(model), tokens_budget=400, progress=lambda line: None
        )
        del target
        save_student(weak, config.cache_dir)
        worse = write_student(_random(read_student(shipped)), folder / "random.safetensors")
        requests = [
            Asked(question, temperature, seed)
            for seed, question in enumerate(mt_bench()[: told.questions])
            for temperature in _TEMPERATURES
        ]
        trials: list[dict[str, Any]] = []
        with LocalCluster(config, paceline_app(), on_progress=on_progress) as cluster:
            state = cluster.state
            with DemoClients(state, "none") as clients:
                load = SteadyLoad(clients, requests, max_tokens=told.tokens, at_once=told.clients)
                on_progress(f"{len(requests)} answers by plain decoding")
                load.learn_plain_texts()
                with load:
                    for candidate, source in (("trained", shipped), ("random weights", worse)):
                        on_progress(f"on trial: {candidate}")
                        trials.append(
                            {"candidate": candidate} | _trial(config, source, load, told.timeout_s)
                        )
                on_progress("reading the metrics")
                status = _status(state)
        logged = read_prompts(
            folder / "traffic", "own", Tokenizer.load(model), "the demo's traffic log"
        )
    return {
        "trials": trials,
        "answers": load.num_equal + len(load.problems),
        "problems": load.problems,
        "status": status,
        "logged_prompts": len(set(logged.prompts)),
        "questions": told.questions,
        "seconds": round(time.monotonic() - started, 1),
    }


def _status(state: ClusterState) -> dict[str, float]:
    """What ``paceline status`` shows, once Ray has exported how the trials ended."""
    deadline = time.monotonic() + _METRICS_TIMEOUT_S
    while True:
        status = _drafters(MetricsSnapshot.read(state.metrics_url))
        has_all = all(f"candidates {end}" in status for end in _ENDS)
        if has_all or time.monotonic() > deadline:
            return status
        time.sleep(_POLL_S)


def _trial(
    config: ClusterConfig, source: Path, load: SteadyLoad, timeout_s: float
) -> dict[str, Any]:
    began, answers_before = time.monotonic(), load.num_equal
    shelf = offer(config, source)
    while shelf.candidate.exists() and time.monotonic() - began < timeout_s:
        time.sleep(_POLL_S)
    decision = shelf.last_decision()
    return {
        "outcome": decision.outcome if decision else "undecided",
        "reason": decision.reason if decision else "",
        "answers_meanwhile": load.num_equal - answers_before,
        "seconds": round(time.monotonic() - began, 1),
    }


def _bars(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    better, worse = (trial["outcome"] for trial in report["trials"])
    found = {
        "a better draft is": (better, "promoted"),
        "a worse draft is": (worse, "rolled_back"),
        "answers that failed or differ": (len(report["problems"]), 0),
        "different prompts logged with consent": (report["logged_prompts"], report["questions"]),
    }
    return {
        name: {"value": value, "bar": bar, "holds": value == bar}
        for name, (value, bar) in found.items()
    } | {
        "trials that the metrics tell of": {
            "value": [report["status"].get(f"candidates {end}", 0) for end in _ENDS],
            "bar": [1, 1],
            "holds": all(report["status"].get(f"candidates {end}") == 1 for end in _ENDS),
        },
        "answers": {"value": report["answers"], "bar": "> 0", "holds": report["answers"] > 0},
    }


def main() -> int:
    """Run, show, write the report; 0 if everything holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--min-sessions", type=int, default=10)
    parser.add_argument("--min-rounds", type=int, default=120)
    parser.add_argument("--timeout-s", type=float, default=150.0)
    told = parser.parse_args()
    try:
        with stop_on_signals(lambda: err.print("stopping")), steps() as tell:
            report = run(told, tell)
    except StopRequestedError:
        fail("interrupted; everything was stopped")
        return 1
    except ClusterError as error:
        fail(str(error))
        return 1
    report["bars"] = bars = _bars(report)
    _REPORT.parent.mkdir(parents=True, exist_ok=True)
    _REPORT.write_text(json.dumps(report, indent=2) + "\n")
    table = Table("candidate", "outcome", "answers meanwhile", "seconds")
    for trial in report["trials"]:
        table.add_row(
            trial["candidate"],
            trial["outcome"],
            str(trial["answers_meanwhile"]),
            str(trial["seconds"]),
        )
    out.print(table)
    for trial in report["trials"]:
        out.print(f"{trial['candidate']}: {trial['reason']}")
    for name, bar in bars.items():
        out.print(f"{'holds' if bar['holds'] else 'BROKEN'}  {name}: {bar['value']}")
    out.print(f"report: {_REPORT}")
    return 0 if all(bar["holds"] for bar in bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
