"""``paceline train draft`` in processes of its own, some of them killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import yaml

from tests.ray_workers import run_and_kill_one

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.ray_workers import KilledOne

_POLL_S = 0.05


class Command:
    """The command with one set of settings and prompts."""

    def __init__(self, folder: Path, prompts: Sequence[str], settings: dict[str, Any]) -> None:
        """Write both to files in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        config, texts = folder / "config.yaml", folder / "prompts.txt"
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        texts.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
        self._arguments = [
            *(sys.executable, "-m", "cluster", "train", "draft", "--json"),
            *("--config", str(config), "--prompts", str(texts)),
        ]

    def run(self, out: Path, environment: dict[str, str] | None = None) -> dict[str, Any]:
        """To the end; its report."""
        done = subprocess.run(
            [*self._arguments, "--out", str(out)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=os.environ | (environment or {}),
        )
        report: dict[str, Any] = json.loads(done.stdout)
        return report

    def run_and_kill_one(self, out: Path, environment: dict[str, str]) -> KilledOne:
        """To the end, with one of several training processes killed behind the first checkpoint."""
        return run_and_kill_one(
            [*self._arguments, "--out", str(out)],
            os.environ | environment,
            lambda _: (out / "checkpoint.pt").is_file(),
        )

    def kill_when(self, out: Path, is_there: Callable[[], bool]) -> None:
        """Start it, and end it by SIGKILL as soon as a condition holds.

        Raises:
            RuntimeError: it ended before that.
        """
        with subprocess.Popen(
            [*self._arguments, "--out", str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while not is_there():
                if process.poll() is not None:
                    raise RuntimeError("the command ended before it could be killed")
                time.sleep(_POLL_S)
            process.send_signal(signal.SIGKILL)


def processes(count: int, tensor_parallel: int = 1) -> dict[str, str]:
    """Settings of a training in so many processes on this machine, and in no fewer."""
    return {
        "PACELINE_TRAINING__NUM_PROCESSES": str(count),
        "PACELINE_TRAINING__MIN_PROCESSES": str(count),
        "PACELINE_TRAINING__TENSOR_PARALLEL": str(tensor_parallel),
        "RAY_ADDRESS": "",
    }


def answered(alone: Path, out: Path) -> Path:
    """A folder with the answers and features of a job that was done, but no training."""
    out.mkdir()
    shutil.copy(alone / "answers.jsonl", out)
    shutil.copytree(alone / "features", out / "features")
    return out


def killed_in_every_stage(command: Command, out: Path) -> dict[str, Any]:
    """Kill it among its answers, among its features and in its training; then let it end."""

    def num_answers() -> int:
        log = out / "answers.jsonl"
        return len(log.read_bytes().splitlines()) - 1 if log.is_file() else 0

    def has_shard() -> bool:
        return any((out / "features").glob("held-out/*.safetensors"))

    command.kill_when(out, lambda: num_answers() >= 3)
    command.kill_when(out, has_shard)
    command.kill_when(out, (out / "checkpoint.pt").is_file)
    return command.run(out)
