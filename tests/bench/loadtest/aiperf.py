"""NVIDIA's ``aiperf`` sends the same requests at the same times over HTTP: does it see the same?"""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

from tests.bench.peer_environments import environment

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cluster.load.outcome import Outcome
    from cluster.load.workload import LoadRequest

VERSION = "0.13.0"
_PINNED = f"aiperf=={VERSION}"
_TIMEOUT_S = 600.0
MEASURES = {
    "requests per second": "request_throughput",
    "output tokens per second": "output_token_throughput",
    "mean ms to the first text": "time_to_first_token",
    "mean ms to the last text": "request_latency",
    "mean ms of a token behind the first": "inter_token_latency",
}
"""What is compared -> its name there."""


class AiPerf:
    """The tool, in an environment of its own.

    Args:
        folder: for what it reads and writes.
        tokenizer: the model's folder. It is loaded and not used: tokens are counted by the server.
    """

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        python = environment("aiperf", _PINNED, lambda pip: pip(_PINNED))
        self._command = python.parent / "aiperf"
        self._folder = folder
        self._tokenizer = tokenizer

    def run(self, url: str, model: str, schedule: Sequence[LoadRequest]) -> dict[str, float]:
        """By measure, of answers to a schedule of questions.

        Raises:
            RuntimeError: it failed, or requests did.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        asked, log = self._folder / "asked.jsonl", self._folder / "aiperf.log"
        lines = (json.dumps(_row(request, model)) + "\n" for request in schedule)
        asked.write_text("".join(lines), encoding="utf-8")
        command = [
            *(str(self._command), "profile", "--model", model, "--url", url),
            *("--endpoint-type", "chat", "--streaming", "--use-server-token-count"),
            *("--tokenizer", str(self._tokenizer)),
            *("--input-file", str(asked), "--custom-dataset-type", "mooncake_trace"),
            *("--fixed-schedule", "--artifact-dir", str(self._folder), "--ui", "none"),
            *("--no-server-metrics", "--no-gpu-telemetry"),
            # Two cores are all that the smallest machine has.
            *("--workers-max", "1", "--record-processors", "1"),
        ]
        # Offline it takes a folder for a name on a hub.
        variables = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        found = self._folder / "profile_export_aiperf.json"
        found.unlink(missing_ok=True)
        with log.open("w", encoding="utf-8") as out:
            code = subprocess.run(
                command, stdout=out, stderr=out, env=variables, timeout=_TIMEOUT_S, check=False
            ).returncode
        if code or not found.is_file():
            raise RuntimeError(f"aiperf ended with {code}: see {log}")
        told: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
        count = told["request_count"]["avg"]
        if count != len(schedule):
            raise RuntimeError(f"aiperf has {count:.0f} of {len(schedule)} answers: see {log}")
        return {measure: told[name]["avg"] for measure, name in MEASURES.items()}


def as_aiperf_counts(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The same measures of our own run, by aiperf's definitions.

    A request begins when it leaves, a connection that it opens included. Only events with text
    count: the first one is the first token, the last one the end, of the run too. Tokens are those
    of the server's usage, and all but one lie between the first event and the last.

    Raises:
        RuntimeError: requests failed.
    """
    if failed := [outcome.error for outcome in outcomes if outcome.ending != "complete"]:
        raise RuntimeError(f"{len(failed)} of {len(outcomes)} requests failed: {failed[0]}")
    seconds = max(each.event_s[-1] for each in outcomes) - min(each.sent_s for each in outcomes)
    first = [each.event_s[0] - each.sent_s for each in outcomes]
    last = [each.event_s[-1] - each.sent_s for each in outcomes]
    behind = [
        (whole - one) / (each.num_output_tokens - 1)
        for each, one, whole in zip(outcomes, first, last, strict=True)
    ]
    values = (
        len(outcomes) / seconds,
        sum(each.num_output_tokens for each in outcomes) / seconds,
        *(1000 * sum(times) / len(times) for times in (first, last, behind)),
    )
    return dict(zip(MEASURES, values, strict=True))


def _row(request: LoadRequest, model: str) -> dict[str, Any]:
    payload = {
        "model": model,
        "messages": [{"role": "user", "content": request.prompt}],
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.ignore_eos:
        payload["ignore_eos"] = True
    return {"timestamp": 1000 * request.at_s, "payload": payload}
