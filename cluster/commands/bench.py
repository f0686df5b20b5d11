"""``paceline bench``: load on a running cluster."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from cluster.chat_client import ChatClient
from cluster.commands.options import (
    ClusterOption,
    JsonOption,
    check_writable,
)
from cluster.console import err, out
from cluster.errors import ConfigError
from cluster.load.arrivals import arrival_times, parse_profile
from cluster.load.plot import draw
from cluster.load.run import LoadTest, Progress
from cluster.load.summary import Slo
from cluster.load.surfaces import surfaces
from cluster.load.workload import (
    builtin_questions,
    of_lengths,
    of_questions,
    of_trace,
    read_questions,
)
from cluster.state import default_state_dir, find_cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_REPORT = Path("build/reports/serve.json")
_INTERRUPTED = 130
_STOPPED = (
    "stopped after {at_s:.0f} s: {num_broken_off} requests in flight were broken off, "
    "{num_never_due} were not due yet"
)

app = typer.Typer(help="Put load on a running cluster.", no_args_is_help=True)


class SurfaceChoice(StrEnum):
    """Where requests go."""

    HTTP = "http"
    GRPC = "grpc"
    BOTH = "both"

    @property
    def names(self) -> tuple[str, ...]:
        """Of the surfaces."""
        return ("http", "grpc") if self is SurfaceChoice.BOTH else (self.value,)


@app.callback()
def _bench() -> None:
    """Put load on a running cluster."""


@app.command("serve")
def serve(
    context: typer.Context,
    rate: Annotated[
        str,
        typer.Option(
            help="Requests a second over time: RATE:SECONDS, FROM-TO:SECONDS for a ramp, "
            "LOW~HIGH:SECONDS for a wave; parts follow each other with commas."
        ),
    ] = "1:30",
    burstiness: Annotated[
        float,
        typer.Option(min=0, help="Variance of gaps over their squared mean; 1 is Poisson, 0 even."),
    ] = 1.0,
    surface: Annotated[
        SurfaceChoice, typer.Option(help="Both take requests of one schedule in turn.")
    ] = SurfaceChoice.HTTP,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Questions, a line each, or .jsonl; the package's own by default."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Made-up prompts of this length, which share nothing.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Mooncake's .jsonl or Azure's .csv; it says when and how long."),
    ] = None,
    speed: Annotated[float, typer.Option(min=0.001, help="Of the trace's clock.")] = 1.0,
    scale: Annotated[float, typer.Option(min=0.001, help="Of the trace's lengths.")] = 1.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of the trace, by our clock.")] = 60.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer; not of a trace's.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of arrivals and made-up prompts.")] = 0,
    slo_ttft: Annotated[
        float | None, typer.Option(min=0, help="Seconds to the first text of a good request.")
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(min=0, help="Seconds a token behind it.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds of a request.")] = 120.0,
    max_in_flight: Annotated[int, typer.Option(min=1, help="More are not sent and fail.")] = 4096,
    url: Annotated[
        str | None, typer.Option(help="A server elsewhere, such as http://host:8000.")
    ] = None,
    grpc_address: Annotated[
        str | None, typer.Option("--grpc", help="Its gRPC address, such as host:9000.")
    ] = None,
    cluster: ClusterOption = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="PACELINE_API_KEY", help="Where keys are asked for.")
    ] = None,
    path: Annotated[Path, typer.Option("--out", help="The report; a picture beside it.")] = _REPORT,
    requests_path: Annotated[
        Path | None, typer.Option("--requests", help="A line of JSON for each request.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Send requests at their times, however the server fares, and report what became of them.

    Waiting is counted from when a request was due. Rejected requests are failures. Ctrl-C ends the
    run and reports what has ended so far.
    """
    if trace is None:
        _refuse(context, ("speed", "scale", "seconds"), "only with --trace")
    else:
        _refuse(
            context, ("rate", "burstiness", "max_tokens"), "not with --trace, which says it itself"
        )
    questions = read_questions(prompts) if prompts else builtin_questions()
    times = arrival_times(parse_profile(rate), burstiness=burstiness, seed=seed)
    if sum(given is not None for given in (prompts, prompt_tokens, trace)) > 1:
        raise ConfigError(("--prompts, --prompt-tokens and --trace: give one of them",))
    if trace is not None:
        schedule = list(of_trace(trace, speed=speed, scale=scale, seconds=seconds))
    elif prompt_tokens is not None:
        schedule = list(of_lengths(times, prompt_tokens, max_tokens, seed))
    else:
        schedule = list(of_questions(times, questions, max_tokens))
    if not schedule:
        raise ConfigError(("no request falls into the time given",))
    check_writable("--out", path)
    if requests_path is not None:
        check_writable("--requests", requests_path)

    state = None if url else find_cluster(default_state_dir(), cluster)
    if state is not None:
        url, grpc_address = state.http_url, grpc_address or state.grpc_address
    address = (url or "").removesuffix("/").removesuffix("/v1")
    if grpc_address is None and "grpc" in surface.names:
        raise ConfigError(("--grpc: a server elsewhere needs its gRPC address too",))
    with ChatClient(address, api_key) as client:
        model = client.model()
    test = LoadTest(
        schedule=schedule,
        surfaces=surfaces(
            surface.names,
            http_url=address,
            grpc_address=grpc_address or "",
            model=model,
            api_key=api_key,
            temperature=temperature,
        ),
        slo=Slo(ttft_s=slo_ttft, tpot_s=slo_tpot),
        timeout_s=timeout,
        max_in_flight=max_in_flight,
        metrics_url=state.metrics_url if state else None,
    )
    report, outcomes = _run(test)
    report |= {
        "model": model,
        "load": {
            "arrivals": trace.name if trace else rate,
            "burstiness": None if trace else burstiness,
            "surfaces": surface.names,
            "seed": seed,
            "temperature": temperature,
        },
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    has_picture = draw(report, path.with_suffix(".png"))
    if requests_path is not None:
        rows = (json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
        requests_path.write_text("".join(rows), encoding="utf-8")
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        out.print(_table(report))
        for error, count in report["all"]["errors"].items():
            out.print(f"{count} x {error}", style="red", markup=False)
        written = [path, path.with_suffix(".png")] if has_picture else [path]
        out.print(" and ".join(map(str, written)))
    if stopped := report["stopped"]:
        err.print(_STOPPED.format(**stopped), style="yellow")
        raise typer.Exit(_INTERRUPTED)


def _refuse(context: typer.Context, names: Sequence[str], reason: str) -> None:
    """Refuse options that would do nothing.

    Raises:
        ConfigError: some of them are given.
    """
    given = [
        f"--{name.replace('_', '-')}"
        for name in names
        if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"
    ]
    if given:
        raise ConfigError((f"{', '.join(given)}: {reason}",))


def _run(test: LoadTest) -> tuple[dict[str, Any], list[Any]]:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Bar(*columns, console=err) as bar:
        task = bar.add_task("", total=len(test.schedule), now="")

        def show(progress: Progress) -> None:
            now = f"{progress.num_in_flight} in flight, {progress.num_failed} failed"
            bar.update(task, completed=progress.num_complete + progress.num_failed, now=now)

        return asyncio.run(_until_signal(test, show))


async def _until_signal(
    test: LoadTest, show: Callable[[Progress], None]
) -> tuple[dict[str, Any], list[Any]]:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()

    def end(signum: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(signum)  # a second one is not waited upon

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, end, signum)
    return await test.run(show, stop)


def _table(report: dict[str, Any]) -> Table:
    columns = {"all": report["all"]} | (report["surfaces"] if len(report["surfaces"]) > 1 else {})
    table = Table("", *columns)
    for label, key, unit in _ROWS:
        table.add_row(label, *(_shown(summary, key, unit) for summary in columns.values()))
    return table


_ROWS: Sequence[tuple[str, str, str]] = (
    ("requests", "num_requests", ""),
    ("complete", "num_complete", ""),
    ("failed, rejected ones included", "num_failed", ""),
    ("rejected", "num_rejected", ""),
    ("good: within the SLO", "num_good", ""),
    ("good requests / s", "goodput_rps", ""),
    ("output tokens / s", "output_tokens_per_s", ""),
    ("prompt tokens found cached", "num_cached_tokens", ""),
    ("first text, ms (p50 p95 p99)", "ttft_s", "ms"),
    ("a token behind it, ms", "tpot_s", "ms"),
    ("between pieces, ms", "gap_s", "ms"),
    ("whole answer, ms", "latency_s", "ms"),
    ("sent too late, ms", "lateness_s", "ms"),
)


def _shown(summary: dict[str, Any], key: str, unit: str) -> str:
    value = summary[key]
    if unit:
        cuts = value["percentiles"]
        return "  ".join(f"{cuts[cut] * 1000:.0f}" for cut in ("p50", "p95", "p99") if cuts) or "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
