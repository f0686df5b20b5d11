"""``make soak-engine``: the default model under twice the load it can carry, for a long time.

First the capacity is measured, then throughput and latency at several loads, then the soak runs.
It fails if a page leaks, memory grows, or a request does not end in exactly one terminal event.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table

from deployments.engine.config import TorchEngineConfig
from deployments.engine.factory import build_engine
from deployments.engine.speculation.split_speculator import SplitSpeculator
from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from deployments.model_files import model_folder
from deployments.tokenizer import Tokenizer
from tests.soak.engine.clients import Clients
from tests.soak.engine.memory import Sample, growth_mb, slope_mb_per_min, tokens_per_s
from tests.soak.engine.workload import Workload

if TYPE_CHECKING:
    from deployments.engine.torch_engine.engine import TorchEngine

_REPORT = Path("build/reports/soak_engine.json")
_TEXTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/operations.md")
_LOADS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
_SOAK_LOAD = 2.0
_CHECKED_EVERY_STEPS = 20
_DRAIN_TIMEOUT_S = 180.0
_MAX_SLOPE_MB_PER_MIN = 1.0
_MAX_GROWTH_MB = 16.0
"""Of peaks; a run of a few minutes has too few samples for a slope."""


def start(threads: int, dtype: str, weights: str) -> tuple[TorchEngine, list[int]]:
    """The engine, checking its own books every few steps, and a text for prompts."""
    config = TorchEngineConfig.model_validate(
        {
            "dtype": dtype,
            "weights": weights,
            "num_threads": threads,
            # Fewer pages than 16 sequences of this workload want, so that some are preempted.
            "num_pages": 64,
            "max_waiting": 48,
            "max_model_len": 2048,
        }
    )
    cache_dir = default_cache_dir()
    prepare_builtin(cache_dir, print)
    tokenizer = Tokenizer.load(model_folder(config.model, cache_dir))
    engine = build_engine(
        config,
        cache_dir=cache_dir,
        page_store_factory=None,
        speculator=SplitSpeculator(config.speculation, vocab_size=tokenizer.vocab_size),
        detokenize=tokenizer.decode,
    )
    core, step = engine._core, engine._core.step  # type: ignore[attr-defined]

    def checked_step() -> bool:
        has_worked = step()
        if core._num_steps % _CHECKED_EVERY_STEPS == 0:
            core.check_integrity()
        return has_worked

    core.step = checked_step
    text = "\n".join(Path(name).read_text(encoding="utf-8") for name in _TEXTS)
    return engine, tokenizer.encode(text)  # type: ignore[return-value]


def percentile_ms(values: list[float], percent: int) -> float | None:
    """A percentile of seconds, in milliseconds; None if there are too few."""
    return 1000 * quantiles(values, n=100)[percent - 1] if len(values) > 1 else None


def describe(clients: Clients, seconds: float, engine: TorchEngine) -> dict[str, Any]:
    """What one stretch of load gave."""
    refused = clients.outcomes["EngineOverloadedError"]
    return {
        "sent_per_s": clients.num_sent / seconds,
        "tokens_per_s": clients.num_tokens / seconds,
        "ttft_p50_ms": percentile_ms(clients.latencies.first_token, 50),
        "ttft_p95_ms": percentile_ms(clients.latencies.first_token, 95),
        "tpot_p50_ms": percentile_ms(clients.latencies.per_token, 50),
        "tpot_p95_ms": percentile_ms(clients.latencies.per_token, 95),
        "refused_share": refused / max(1, clients.num_sent),
        "late_share": clients.outcomes["DeadlineExceededError"] / max(1, clients.num_sent),
        "outcomes": dict(clients.outcomes),
        "preemptions_since_start": engine.stats().num_preemptions,
    }


async def measure_capacity(engine: TorchEngine, text: list[int], seconds: float) -> float:
    """Requests per second that a full engine serves."""
    clients = Clients(engine, Workload(text, seed=1))
    await clients.keep_busy(32, seconds / 3, min_served=16)
    capacity = await clients.keep_busy(32, seconds, min_served=32)
    await clients.leave()
    return capacity


async def measure_loads(
    engine: TorchEngine, text: list[int], capacity: float, seconds: float
) -> list[dict[str, Any]]:
    """Throughput and latency at fractions and multiples of the capacity."""
    rows = []
    for load in _LOADS:
        clients = Clients(engine, Workload(text, seed=2))
        await clients.send_at(load * capacity, seconds)
        rows.append({"load": load, **describe(clients, seconds, engine)})
        await clients.leave()
        await _until_idle(engine)
        print(f"load {load:4.2f}: {rows[-1]['tokens_per_s']:.0f} tok/s", flush=True)  # noqa: T201
    return rows


async def soak(
    engine: TorchEngine, text: list[int], capacity: float, minutes: float
) -> tuple[Clients, dict[str, Any], list[Sample]]:
    """Twice the capacity, until the time is over and the last request has ended."""
    clients = Clients(engine, Workload(text, seed=3))
    samples: list[Sample] = []
    started = time.monotonic()

    async def watch() -> None:
        process, period_s = psutil.Process(), min(5.0, minutes)
        while True:
            at_s, stats = time.monotonic() - started, engine.stats()
            resident_mb = process.memory_info().rss / 2**20
            samples.append(Sample(at_s, resident_mb, clients.num_tokens))
            if len(samples) % 3 == 1:
                print(  # noqa: T201
                    f"{at_s / 60:5.1f} min  {resident_mb:6.0f} MB  {clients.num_sent:6} sent  "
                    f"{sum(clients.outcomes.values()):6} ended  {stats.num_running:3} running  "
                    f"{stats.num_waiting:3} waiting  {stats.num_free_pages:3} pages free  "
                    f"{stats.num_preemptions:4} preemptions  {len(clients.wrong)} wrong",
                    flush=True,
                )
            await asyncio.sleep(period_s)

    watching = asyncio.create_task(watch())
    await clients.send_at(_SOAK_LOAD * capacity, 60 * minutes)
    watching.cancel()
    row = describe(clients, 60 * minutes, engine)
    await clients.wait(_DRAIN_TIMEOUT_S)
    await _until_idle(engine)
    return clients, row, samples


async def _until_idle(engine: TorchEngine) -> None:
    end = time.monotonic() + 30.0
    while time.monotonic() < end:
        stats = engine.stats()
        if not stats.num_running and not stats.num_waiting:
            return
        await asyncio.sleep(0.05)


def hold_bars(
    engine: TorchEngine, clients: Clients, samples: list[Sample]
) -> dict[str, dict[str, Any]]:
    """What must be true at the end."""
    stats = engine.stats()
    slope, growth = slope_mb_per_min(samples), growth_mb(samples)
    num_ended = sum(clients.outcomes.values())
    return {
        "share served, at least half of what the capacity allows": {
            "value": clients.num_served / max(1, clients.num_sent),
            "bar": 0.5 / _SOAK_LOAD,
            "holds": clients.num_served >= 0.5 / _SOAK_LOAD * clients.num_sent,
        },
        "pages not free after the drain": _at_most(stats.num_total_pages - stats.num_free_pages, 0),
        "requests not ended in exactly one terminal event": _at_most(
            len(clients.wrong) + abs(clients.num_sent - num_ended), 0
        ),
        "resident memory, second half, MB per minute": {
            "value": slope,
            "bar": _MAX_SLOPE_MB_PER_MIN,
            "holds": slope <= _MAX_SLOPE_MB_PER_MIN or growth <= _MAX_GROWTH_MB,
            "growth_of_peaks_mb": growth,
        },
    }


def _at_most(value: float, bar: float) -> dict[str, Any]:
    return {"value": value, "bar": bar, "holds": value <= bar}


def show(report: dict[str, Any]) -> None:
    """Print the tables and the bars."""
    console = Console(width=140)
    table = Table(title=f"capacity {report['capacity_requests_per_s']:.2f} requests/s")
    columns = (
        ("sent_per_s", "{:.2f}"),
        ("tokens_per_s", "{:.0f}"),
        ("ttft_p50_ms", "{:.0f}"),
        ("ttft_p95_ms", "{:.0f}"),
        ("tpot_p50_ms", "{:.0f}"),
        ("tpot_p95_ms", "{:.0f}"),
        ("refused_share", "{:.0%}"),
        ("late_share", "{:.0%}"),
    )
    for name in ("load", *(name.replace("_", " ") for name, _ in columns)):
        table.add_column(name)
    for row in (*report["loads"], {"load": "soak", **report["soak"]}):
        cells = (form.format(row[name]) if row[name] is not None else "-" for name, form in columns)
        table.add_row(str(row["load"]), *cells)
    console.print(table)
    console.print("outcomes:", report["soak"]["outcomes"])
    console.print("tokens per second by quarter:", report["tokens_per_s_by_quarter"])
    for name, bar in report["bars"].items():
        verdict = "holds" if bar["holds"] else "FAILS"
        console.print(f"{verdict}  {name}: {bar['value']:.2f}, bar {bar['bar']}")
    for problem in report["wrong"][:20]:
        console.print("wrong:", problem)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole run."""
    engine, text = start(options.threads, options.dtype, options.weights)
    try:
        capacity = await measure_capacity(engine, text, options.load_seconds)
        await _until_idle(engine)
        print(f"capacity: {capacity:.2f} requests per second", flush=True)  # noqa: T201
        loads = await measure_loads(engine, text, capacity, options.load_seconds)
        clients, row, samples = await soak(engine, text, capacity, options.minutes)
        engine.check_health()
        bars = hold_bars(engine, clients, samples)
    finally:
        await engine.close()
    return {
        "bars": bars,
        "machine": platform.platform(),
        "options": vars(options),
        "capacity_requests_per_s": capacity,
        "loads": loads,
        "soak": {**row, "outcomes": dict(clients.outcomes)},
        "tokens_per_s_by_quarter": [round(tokens_per_s(samples, q), 1) for q in range(4)],
        "resident_mb": [round(sample.resident_mb, 1) for sample in samples],
        "wrong": clients.wrong,
    }


def main() -> int:
    """Run from the command line; 1 if a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="of the soak itself")
    parser.add_argument("--load-seconds", type=float, default=40.0, help="of each measured load")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--weights", default="dense", choices=("dense", "file"))
    options = parser.parse_args()
    report = asyncio.run(run(options))
    _REPORT.parent.mkdir(parents=True, exist_ok=True)
    _REPORT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(report)
    return 0 if all(bar["holds"] for bar in report["bars"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
