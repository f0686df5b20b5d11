"""The contestants: SGLang in a process of its own, once per way to get drafts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from deployments.engine.config import SpeculationConfig
from tests.bench.peer_environments import environment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from deployments.engine.speculation.handshake import Identity

NONE = "none"
POOL = "pool"
SERVED = "pool and copies"
WRONG = "always wrong"
NGRAM = "SGLang's NGRAM"
NGRAM_NARROW = f"{NGRAM}, our width"

_NINJA = "ninja==1.13.0"
_CLOSE_TIMEOUT_S = 60.0
_MOST_SEQUENCES = 8
_NUM_PAGES = 96


class Entry(NamedTuple):
    """One contestant.

    Attributes:
        drafter: of its draft pool, as ``draft.drafter``; None where no pool drafts.
        speculation: its settings.
        extra_args: of SGLang.
        is_essential: the quick run keeps to these.
    """

    name: str
    drafter: str | None = None
    speculation: SpeculationConfig = SpeculationConfig(enabled=False)
    extra_args: Mapping[str, Any] = MappingProxyType({})
    is_essential: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether our algorithm drafts."""
        return self.drafter is not None

    @property
    def needs_compiler(self) -> bool:
        """SGLang compiles the index of its NGRAM where it starts."""
        return not self.is_ours and bool(self.extra_args)


def all_entries(num_draft_tokens: int, fanout: int) -> list[Entry]:
    """Everybody, the one without drafts first."""
    served = SpeculationConfig(num_draft_tokens=num_draft_tokens, fanout=fanout)
    pool = served.model_copy(update={"local_drafter": "none"})
    ngram = {"speculative_algorithm": "NGRAM"}
    # SGLang counts the last committed token as well.
    narrow = ngram | {"speculative_num_draft_tokens": num_draft_tokens + 1}
    return [
        Entry(NONE),
        Entry(POOL, "student", pool, is_essential=False),
        Entry(SERVED, "student", served),
        Entry(WRONG, "tests.bench.sglang.wrong:WrongDrafter", pool),
        Entry(NGRAM, extra_args=ngram, is_essential=False),
        Entry(NGRAM_NARROW, extra_args=narrow),
    ]


class NotRunningError(Exception):
    """A contestant did not start, or has ended."""


class Contestant:
    """A running one.

    Attributes:
        entry: which one.
        version: of SGLang.
    """

    def __init__(
        self,
        entry: Entry,
        python: Path,
        model: Path,
        identity: Identity,
        secret: str,
        endpoint: str | None,
        num_threads: int,
        log: Path,
    ) -> None:
        """Start it; ``wait`` says when it is ready.

        Args:
            entry: which one.
            python: SGLang's.
            model: folder.
            identity: of the model, for the draft pool.
            secret: of the draft pool.
            endpoint: of the draft replica, if it has one.
            num_threads: of SGLang's arithmetic.
            log: what it writes.

        Raises:
            NotRunningError: what it needs cannot be had.
        """
        self.entry = entry
        self.version = ""
        self._log = log
        told = {
            "engine": _settings(entry, model, num_threads),
            "identity": {
                "model": identity.model,
                "vocab_size": identity.vocab_size,
                "vocab_digest": identity.vocab_digest,
            },
            "secret": secret,
            "endpoint": endpoint,
        }
        variables = os.environ | {
            "PYTHONPATH": str(Path.cwd()),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(num_threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if entry.needs_compiler:
            variables["PATH"] = os.pathsep.join([_ninja_folder(), variables["PATH"]])
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(python), "-m", "tests.bench.sglang.contestant", json.dumps(told)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                env=variables,
                # Its processes are one group, so that none is left.
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it is ready.

        Raises:
            NotRunningError: it has ended.
        """
        self.version = self._read()["version"]

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
            if self._process.poll() is None and self.version:
                self.ask(do="close")
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        gives_up_at = time.monotonic() + (_CLOSE_TIMEOUT_S if self.version else 0.0)
        while self._process.poll() is None and time.monotonic() < gives_up_at:
            time.sleep(0.05)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NotRunningError(self._reason())
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _reason(self) -> str:
        status = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"status {status}: {reason_in(lines)}; see {self._log}"


def reason_in(lines: list[str]) -> str:
    """The error that a log is most likely about: the first that ended a traceback.

    A scheduler's error comes before that of the process which waits for the scheduler.
    """
    errors = [line for line in lines if re.match(r"(?:\w+\.)*\w*(?:Error|Exception)\b", line)]
    return (errors or lines or ["it said nothing"])[0].strip()[:300]


def _settings(entry: Entry, model: Path, num_threads: int) -> dict[str, Any]:
    return {
        "kind": "sglang",
        "model": str(model),
        "dtype": "float32",
        "num_pages": _NUM_PAGES,
        "max_num_seqs": _MOST_SEQUENCES,
        "num_threads": num_threads,
        "speculation": entry.speculation.model_dump(mode="json"),
        "sglang": {
            "attention_backend": "torch_native",
            # The others' schedulers must not spin beside the one that is measured.
            "extra_args": {"sleep_on_idle": True, **entry.extra_args},
        },
    }


def _ninja_folder() -> str:
    """Where a ``ninja`` is.

    Raises:
        NotRunningError: there is no C++ compiler, or ninja cannot be installed.
    """
    if shutil.which("c++") is None and shutil.which("g++") is None:
        raise NotRunningError("SGLang compiles its index, and there is no C++ compiler here")
    found = shutil.which("ninja")
    if found is not None:
        return str(Path(found).parent)
    try:
        return str(environment("ninja", _NINJA, lambda pip: pip(_NINJA)).parent)
    except subprocess.CalledProcessError as error:
        raise NotRunningError(
            f"SGLang compiles its index with ninja; pip ended with {error.returncode}"
        ) from error
