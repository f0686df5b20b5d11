"""``make bench-gateway``: what the way through the ingress adds to a call of the engine.

Paceline as ``paceline serve`` starts it, the same application behind Ray Serve's default proxy, the
engine alone behind the same surfaces, all asked by the same clients, and the engine in this very
process, in turn within one run; while one is asked the others stand still. Prints a table, writes
``build/reports/gateway.json`` and ``gateway.png``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.tokenizer import ChatTurn, Tokenizer
from tests.bench.gateway.bars import BARE, DEFAULT, DIRECT, PACELINE, hold_bars
from tests.bench.gateway.clients import Direct, Grpc, Http
from tests.bench.gateway.engine import LETTER, InstantEngine
from tests.bench.gateway.measure import PROMPT, Plan, Way, measure
from tests.bench.gateway.pausing import Turns
from tests.bench.gateway.processor_time import ProcessorTime
from tests.bench.gateway.report import draw, show, summaries
from tests.bench.gateway.server import MODEL
from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bench.gateway.measure import Row

_REPORT = Path("build/reports/gateway.json")
_STOP_S = 90.0
QUICK = Plan(rounds=2, rate=50.0, seconds=4.0, num_streams=4, num_items=128)
FULL = Plan(rounds=5, rate=50.0, seconds=8.0, num_streams=20, num_items=256)


def main() -> int:
    """Measure and report.

    Returns:
        1 if a bar does not hold.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two minutes, for a look")
    plan = QUICK if parser.parse_args().quick else FULL
    _REPORT.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        folder = write_tokenizer(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        log = stack.enter_context(_REPORT.with_suffix(".log").open("w", encoding="utf-8"))
        clusters = {
            gateway: stack.enter_context(_cluster(gateway, folder, log))
            for gateway in (BARE, PACELINE, DEFAULT)
        }
        rows = asyncio.run(_ask(folder, clusters, plan))
    found = summaries(rows)
    bars = hold_bars(found)
    report = {
        "bars": bars,
        "plan": asdict(plan),
        "machine": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "ways": found,
    }
    _REPORT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(found, _REPORT.with_suffix(".png"))
    show(found, bars)
    return 1 if any(bar["holds"] is False for bar in bars.values()) else 0


async def _ask(
    folder: Path, clusters: dict[str, tuple[dict[str, Any], int]], plan: Plan
) -> dict[str, Row]:
    ways = _direct(folder)
    for gateway, (addresses, pid) in clusters.items():
        ways |= _through(gateway, addresses, pid)
    with Turns([pid for _, pid in clusters.values()]) as turns:
        return await measure(ways, plan, turns.give)


def _direct(folder: Path) -> dict[str, Way]:
    tokenizer = Tokenizer.load(folder)
    prompt = tuple(tokenizer.encode_chat([ChatTurn("user", PROMPT)]))
    surface = Direct(DIRECT, InstantEngine(tokenizer.encode(LETTER)[0]), prompt)
    return {DIRECT: Way(surface=surface, streams=True, processor_time=ProcessorTime())}


def _through(gateway: str, at: dict[str, Any], pid: int) -> dict[str, Way]:
    ways: dict[str, Way] = {}
    spent = ProcessorTime(pid)
    for streams, kind in ((False, "whole"), (True, "streamed")):
        for surface in (
            Http(f"{gateway}, HTTP, {kind}", at["http"], MODEL, stream=streams),
            Grpc(f"{gateway}, gRPC, {kind}", at["grpc"], MODEL, stream=streams),
        ):
            ways[surface.name] = Way(
                surface=surface, streams=streams, processor_time=spent, pid=pid
            )
    return ways


@contextmanager
def _cluster(gateway: str, folder: Path, log: Any) -> Iterator[tuple[dict[str, Any], int]]:
    """Addresses of a cluster of its own, and the process to which it belongs."""
    sys.stderr.write(f"starting {gateway}\n")
    module = ["bare"] if gateway == BARE else ["server", gateway]
    module[0] = f"tests.bench.gateway.{module[0]}"
    command = [sys.executable, "-m", *module, str(folder)]
    variables = os.environ | {"PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=variables
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{gateway} did not start: see {log.name}")
        yield json.loads(line), process.pid
    finally:
        process.stdin.close()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
