"""``paceline status``: the clusters of this user on this machine."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
from rich.table import Table

from cluster.commands.options import JsonOption  # noqa: TC001 - typer reads it at run time
from cluster.console import out
from cluster.errors import NoClusterError, RequestError
from cluster.metrics_reader import MetricsSnapshot
from cluster.processes import ClusterProcesses
from cluster.state import default_state_dir, list_states

if TYPE_CHECKING:
    from cluster.state import ClusterState

_TIMEOUT_S = 5.0


def status(as_json: JsonOption = False) -> None:
    """Show running clusters, their addresses and replicas."""
    states = list_states(default_state_dir())
    if not states:
        raise NoClusterError("no cluster is running; start one with: paceline serve")
    reports = [_report(state) for state in states]
    if as_json:
        sys.stdout.write(json.dumps(reports, indent=2) + "\n")
        return
    for report in reports:
        table = Table(title=f"cluster {report.pop('cluster_id')}", title_justify="left")
        table.add_column("what", style="dim")
        table.add_column("value", overflow="fold")
        for name, value in report.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
            table.add_row(name, str(value))
        out.print(table)


def _report(state: ClusterState) -> dict[str, Any]:
    processes = ClusterProcesses(state.cluster_id, Path(state.run_dir)).find()
    alive = state.is_alive()
    snapshot = _snapshot(state) if alive else None
    return {
        "cluster_id": state.cluster_id,
        "health": _health(state) if alive else "its owner died; the next start ends the rest",
        "model": state.model,
        "http": state.http_url,
        "grpc": state.grpc_address,
        "metrics": state.metrics_url,
        "valkey": state.kv_address or "none",
        "replicas": _replicas(snapshot) if snapshot else {},
        "autoscaling": _autoscaling(snapshot) if snapshot else {},
        "speculation": _speculation(snapshot) if snapshot else {},
        "drafters": _drafters(snapshot) if snapshot else {},
        "prefill": _prefill(snapshot) if snapshot else {},
        "owner_pid": state.pid,
        "processes": len(processes),
        "memory_mib": sum(map(_proportional_bytes, processes)) >> 20,
        "uptime_s": round(time.time() - state.started),
    }


def _health(state: ClusterState) -> str:
    try:
        response = httpx.get(f"{state.http_url}/health", timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        return f"does not answer ({type(error).__name__})"
    return "ok" if response.is_success else f"answers {response.status_code}"


def _snapshot(state: ClusterState) -> MetricsSnapshot | None:
    try:
        return MetricsSnapshot.read(state.metrics_url)
    except RequestError:
        return None


def _replicas(snapshot: MetricsSnapshot) -> dict[str, int]:
    healthy = snapshot.by_label("serve_deployment_replica_healthy", "deployment")
    return {name: int(count) for name, count in healthy.items()}


def _autoscaling(snapshot: MetricsSnapshot) -> dict[str, str]:
    """What the policy decided last for each pool, and why: what it needs by each signal."""
    told: dict[str, str] = {}
    decided = snapshot.by_label("paceline_autoscaling_replicas", "pool")
    for pool, number in decided.items():
        needs = snapshot.by_label("paceline_autoscaling_need_replicas", "cause", pool=pool)
        named = [f"{cause} {need:.2f}" for cause, need in needs.items() if need]
        told[pool] = f"{int(number)} (needs {'; '.join(named) or 'none'})"
    return told


def _speculation(snapshot: MetricsSnapshot) -> dict[str, int]:
    """Draft tokens by what became of them and why, and tables by their arrival."""
    verified = snapshot.by_label("paceline_draft_tokens_total", "origin")
    accepted = snapshot.by_label("paceline_accepted_draft_tokens_total", "origin")
    tables = snapshot.by_label("paceline_outcome_tables_total", "result")
    counts = {f"verified ({origin})": number for origin, number in verified.items()}
    counts |= {f"accepted ({origin})": number for origin, number in accepted.items()}
    withheld = snapshot.by_label("paceline_withheld_draft_tokens_total", "reason")
    counts |= {f"withheld ({reason})": number for reason, number in withheld.items()}
    targets = snapshot.by_label("paceline_tpot_target_steps_total", "result")
    counts |= {f"TPOT targets {result}": number for result, number in targets.items()}
    counts |= {f"tables {result.replace('_', ' ')}": number for result, number in tables.items()}
    return {name: int(number) for name, number in counts.items()}


def _drafters(snapshot: MetricsSnapshot) -> dict[str, float]:
    """What a drafter's guesses were worth by the text that followed, and the trials of new ones."""
    rounds = snapshot.by_label("paceline_draft_scored_rounds_total", "drafter")
    confirmed = snapshot.by_label("paceline_draft_confirmed_tokens_total", "drafter")
    scores: dict[str, float] = {}
    for drafter, number in rounds.items():
        if number:
            scores[f"rounds ({drafter})"] = int(number)
            scores[f"confirmed a round ({drafter})"] = round(confirmed.get(drafter, 0) / number, 3)
    trials = snapshot.by_label("paceline_draft_trials_total", "outcome")
    scores |= {f"candidates {name.replace('_', ' ')}": int(n) for name, n in trials.items()}
    if running := int(snapshot.total("paceline_draft_trial_running")):
        scores["replicas with a candidate"] = running
    return scores


def _prefill(snapshot: MetricsSnapshot) -> dict[str, float]:
    """Where prompts were computed and why, and what came of those that the prefill pool had."""
    chosen = snapshot.by_label("paceline_prefill_prompts_total", "reason")
    calls = snapshot.by_label("paceline_prefill_calls_total", "outcome")
    told: dict[str, float] = {reason: int(number) for reason, number in chosen.items()}
    told |= {f"outcome {outcome.replace('_', ' ')}": int(n) for outcome, n in calls.items()}
    if num_tokens := int(snapshot.total("paceline_prefill_tokens_total")):
        told["tokens computed for targets"] = num_tokens
    if num_calls := snapshot.total("paceline_prefill_seconds_count"):
        seconds = snapshot.total("paceline_prefill_seconds_sum")
        told["seconds waited (mean)"] = round(seconds / num_calls, 3)
    return told


def _proportional_bytes(process: psutil.Process) -> int:
    """Memory of a process, with what it shares counted in parts: sums of these are true."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0
