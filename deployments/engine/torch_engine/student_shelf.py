"""The folder of a target's students: the one that drafts, the one on trial, the one before.

Draft replicas follow the folder while they serve, so a file that is put here is taken up without a
restart, and a decision that one replica writes down here is that of all replicas that see the
folder. Files only ever appear and vanish whole.

========================  ==========================================================
``student.safetensors``   drafts; without it the one that comes with the package does
``candidate.safetensors`` on trial: drafts for a share of the sessions
``previous.safetensors``  drafted before a candidate was promoted
``decision.json``         what became of the last candidate, and why
``begun``                 a byte for every time that a replica began to try the candidate
========================  ==========================================================
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.torch_engine.student import (
    find_student,
    shipped_student,
    student_path,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


class FileStamp(NamedTuple):
    """Tells a file from the one that was there before; stays the same when it is renamed."""

    inode: int
    modified_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What became of a candidate.

    Attributes:
        outcome: ``promoted``, ``rolled_back`` or ``withdrawn``.
        reason: with the figures it rests on.
        decided_at: seconds since the epoch.
    """

    outcome: str
    reason: str
    decided_at: float


class StudentShelf:
    """Of one target. Any number of processes may use it.

    Args:
        cache_dir: Paceline's cache.
        target_digest: of the target's weights.
    """

    def __init__(self, cache_dir: Path, target_digest: str) -> None:
        self._cache_dir = cache_dir
        self._target_digest = target_digest
        self.stable = student_path(cache_dir, target_digest)
        self.candidate = self.stable.with_name("candidate.safetensors")
        self._previous = self.stable.with_name("previous.safetensors")
        self._decision = self.stable.with_name("decision.json")
        self._begun = self.stable.with_name("begun")

    def in_use(self) -> Path:
        """The file that drafts are made with.

        Raises:
            WeightsMissingError: there is none.
        """
        return find_student(self._cache_dir, self._target_digest)

    def offer(self, source: Path) -> None:
        """Put a copy of a student on trial, in the place of any other candidate.

        What became of the one before is forgotten, so the next decision is about this one.
        """
        self.stable.parent.mkdir(parents=True, exist_ok=True)
        with _scratch_copy(source, self.stable.parent) as scratch, self._locked():
            self._decision.unlink(missing_ok=True)
            self._begun.unlink(missing_ok=True)
            scratch.replace(self.candidate)

    def begin(self) -> int:
        """A replica begins to try the candidate; tells how often that happened, this time included.

        A candidate that takes its replica down is begun again and again.
        """
        with self._locked(), self._begun.open("ab") as file:
            file.write(b".")
            return file.tell()

    def promote(self, candidate: FileStamp, decision: Decision) -> bool:
        """Let the candidate draft from now on, and keep what drafted before.

        Returns:
            False if that candidate is no longer on trial; then nothing was changed.
        """
        with self._locked():
            if stamp_of(self.candidate) != candidate:
                return False
            if self.stable.is_file():
                # A copy: whoever dies before the next line leaves a student that drafts.
                with _scratch_copy(self.stable, self.stable.parent) as scratch:
                    scratch.replace(self._previous)
            else:
                self._previous.unlink(missing_ok=True)
            self.candidate.replace(self.stable)
            self._write(decision)
            return True

    def reject(self, candidate: FileStamp, decision: Decision) -> bool:
        """End a trial; nothing else changes.

        Returns:
            False if that candidate is no longer on trial; then nothing was changed.
        """
        with self._locked():
            if stamp_of(self.candidate) != candidate:
                return False
            self.candidate.unlink()
            self._write(decision)
            return True

    def roll_back(self, decision: Decision) -> Path | None:
        """Let the student before this one draft again, or end a trial if there is one.

        Returns:
            What drafts from now on; None if there is nothing to go back to.
        """
        with self._locked():
            if self.candidate.is_file():
                self.candidate.unlink()
            elif self._previous.is_file():
                self._previous.replace(self.stable)
            elif self.stable.is_file() and shipped_student(self._target_digest).is_file():
                self.stable.unlink()
            else:
                return None
            self._write(decision)
            return self.in_use()

    def last_decision(self) -> Decision | None:
        """What became of the last candidate; None while that is not known."""
        try:
            return Decision(**json.loads(self._decision.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def _write(self, decision: Decision) -> None:
        scratch = self._decision.with_suffix(".partial")
        scratch.write_text(json.dumps(asdict(decision), indent=2) + "\n", encoding="utf-8")
        scratch.replace(self._decision)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time; the kernel lets go of it when a process dies."""
        self.stable.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            self.stable.with_name("lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


@contextmanager
def _scratch_copy(source: Path, folder: Path) -> Iterator[Path]:
    """A copy under a name of its own, for as long as it is not moved away."""
    handle, name = tempfile.mkstemp(dir=folder, suffix=".partial")
    os.close(handle)
    scratch = Path(name)
    try:
        shutil.copyfile(source, scratch)
        yield scratch
    finally:
        scratch.unlink(missing_ok=True)


def stamp_of(path: Path) -> FileStamp | None:
    """A file's stamp; None if there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return FileStamp(found.st_ino, found.st_mtime_ns)
