"""The contestants: SGLang in a process of its own, one after the other on the same device."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from deployments.engine.config import SpeculationConfig
from tests.bench.split.pool import SECRET

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from deployments.engine.speculation.handshake import Identity
    from tests.bench.gpu.model import Target

PLAIN = "plain"
EAGLE3 = "EAGLE-3 in SGLang"
STANDALONE = "draft model in SGLang"
REMOTE = "remote drafts"
REMOTE_TIER = "remote drafts, KV tier"

_CLOSE_TIMEOUT_S = 120.0


class NotRunningError(Exception):
    """A contestant did not start, or has ended."""


class Entry(NamedTuple):
    """One contestant.

    Attributes:
        is_drafted: whether a draft replica of ours drafts.
        is_tiered: whether its pages are shared.
        extra_args: of SGLang.
    """

    name: str
    is_drafted: bool = False
    is_tiered: bool = False
    extra_args: Mapping[str, Any] | None = None


class Machine(NamedTuple):
    """What contestants run on.

    Attributes:
        python: SGLang's.
        device: as in ``engine.device``.
        memory_fraction: of the GPU, for weights and pages.
    """

    python: Path
    device: str
    memory_fraction: float


def all_entries(head: Path | None, draft_model: Path | None, num_draft_tokens: int) -> list[Entry]:
    """Everybody; of SGLang's own drafters those whose files are at hand.

    Args:
        head: folder of an EAGLE-3 head.
        draft_model: folder of a small language model of the same vocabulary.
        num_draft_tokens: of a chain, for everybody.
    """
    chain = {
        "speculative_num_steps": num_draft_tokens,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": num_draft_tokens + 1,
    }
    entries = [Entry(PLAIN)]
    for name, algorithm, files in (
        (EAGLE3, "EAGLE3", head),
        (STANDALONE, "STANDALONE", draft_model),
    ):
        if files is not None:
            own = {
                "speculative_algorithm": algorithm,
                "speculative_draft_model_path": str(files.resolve()),
            }
            entries.append(Entry(name, extra_args=own | chain))
    entries.append(Entry(REMOTE, is_drafted=True))
    entries.append(Entry(REMOTE_TIER, is_drafted=True, is_tiered=True))
    return entries


def engine_settings(
    entry: Entry, target: Target, machine: Machine, num_draft_tokens: int
) -> dict[str, Any]:
    """The engine's, as in a cluster's configuration."""
    extra = dict(entry.extra_args or {})
    if target.is_random:
        extra["load_format"] = "dummy"
    sglang: dict[str, Any] = {"extra_args": extra}
    settings: dict[str, Any] = {
        "kind": "sglang",
        "model": str(target.folder),
        "max_num_seqs": 32,
        "max_model_len": 4096,
        "kv_load_timeout_s": 10,
        "speculation": SpeculationConfig(
            enabled=entry.is_drafted, num_draft_tokens=num_draft_tokens
        ).model_dump(mode="json"),
        "sglang": sglang,
    }
    if machine.device == "cpu":
        sglang["attention_backend"] = "torch_native"
        own = {"dtype": "float32", "num_pages": 96, "max_num_seqs": 4, "max_model_len": 2048}
        return settings | own | {"num_threads": 1}
    sglang["memory_fraction"] = machine.memory_fraction
    return settings | {"device": "cuda", "dtype": "bfloat16", "cuda_graphs": True}


class Contestant:
    """A running one.

    Attributes:
        version: of SGLang.
    """

    def __init__(self, told: dict[str, Any], machine: Machine, place: Path, log: Path) -> None:
        """Start it and wait until it is ready.

        Args:
            told: see ``replica.main``.
            machine: where.
            place: for its settings.
            log: what it writes.

        Raises:
            NotRunningError: it does not start.
        """
        self._log = log
        path = place / "settings.json"
        path.write_text(json.dumps(told), encoding="utf-8")
        variables = os.environ | {"PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"}  # noqa: PTH109
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(machine.python), "-m", "tests.bench.gpu.replica", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=variables,
                # Its processes are one group, so that none is left.
                start_new_session=True,
            )
        self._is_ready = False
        self.version: str = self._read()["version"]
        self._is_ready = True

    def ask(self, **question: Any) -> Any:
        """Its answer.

        Raises:
            NotRunningError: it has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise NotRunningError(self._reason()) from error
        return self._read()["answer"]

    def close(self) -> None:
        """End its processes, if need be by force."""
        with suppress(NotRunningError):
            if self._is_ready and self._process.poll() is None:
                self.ask(do="close")
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_CLOSE_TIMEOUT_S if self._is_ready else 0)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            reason = self._reason()
            self.close()
            raise NotRunningError(reason)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _reason(self) -> str:
        """The first error of a traceback; a scheduler's comes before that of who waits for it."""
        status = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [line for line in lines if re.match(r"(?:\w+\.)*\w*(?:Error|Exception)\b", line)]
        text = (found or lines or ["it said nothing"])[0].strip()[:300]
        return f"status {status}: {text}; see {self._log}"


@contextmanager
def running(
    entry: Entry,
    settings: dict[str, Any],
    machine: Machine,
    *,
    identity: Identity,
    endpoint: str | None,
    tier_url: str | None,
    place: Path,
    log: Path,
) -> Iterator[Contestant]:
    """A contestant, as long as this lasts.

    Args:
        entry: which one.
        settings: see ``engine_settings``.
        machine: where.
        identity: of the model.
        endpoint: of the draft replica.
        tier_url: of the tier's Valkey.
        place: for its settings.
        log: what it writes.

    Raises:
        NotRunningError: it does not start.
    """
    tier = {"kind": "valkey", "url": tier_url, "operation_timeout_s": 10}
    told = {
        "engine": settings,
        "identity": asdict(identity),
        "secret": SECRET.get_secret_value(),
        "endpoint": endpoint if entry.is_drafted else None,
        "kv": {"codec": "lossless", "tiers": [tier]} if entry.is_tiered else None,
    }
    contestant = Contestant(told, machine, place, log)
    try:
        yield contestant
    finally:
        contestant.close()


def wait_saved(contestant: Contestant, num_pages: int, timeout_s: float) -> bool:
    """Whether so many pages have reached the tier in time."""
    gives_up_at = time.monotonic() + timeout_s
    while contestant.ask(do="num_saved") < num_pages:
        if time.monotonic() > gives_up_at:
            return False
        time.sleep(0.5)
    return True
