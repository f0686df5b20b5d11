"""The target answers prompts, and its answers are kept as they come.

A draft learns what its target writes, so the answers of a data set are of no use: only its prompts
are. The file is JSON lines, a header and then one answer a line in the order in which they ended; a
line that a killed process left half written is cut off and its answer written again.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from hashlib import blake2b
from threading import Event
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.training.errors import RunMismatchError
from deployments.engine.training.pace import Pace
from deployments.engine.types import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from deployments.engine.base import Engine

_FORMAT = "paceline-answers-1"
_POLL_S = 0.05


class AnswersEndedError(Exception):
    """Nobody waits for answers any more."""


class Question(NamedTuple):
    """A prompt that is to be answered once.

    Attributes:
        prompt_token_ids: up to where the answer begins.
        temperature: 0 for the greedy answer.
    """

    prompt_token_ids: tuple[int, ...]
    temperature: float


class AnswerLog:
    """A file of answers to numbered questions.

    Attributes:
        answers: token ids by question; the token that ended an answer is part of it.
        seconds: that it took to write them, in all processes.
    """

    def __init__(self, path: Path, *, fingerprint: str, is_mine: bool = True) -> None:
        """Open a file, which is made where it is missing.

        Args:
            path: its folder is made, too.
            fingerprint: of target, prompts and settings; a file keeps answers of one only.
            is_mine: this log may write. Of a file that another process writes, only whole lines
                are read, and ``wait_for`` reads those that came since.

        Raises:
            RunMismatchError: the file keeps answers of something else, or is none of these files.
        """
        self._path = path
        self._header = {"format": _FORMAT, "fingerprint": fingerprint}
        self._is_mine = is_mine
        self._num_read = 0
        self._error: BaseException | None = None
        self.answers: dict[int, tuple[int, ...]] = {}
        self.seconds = 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._read_on()
        if is_mine:
            if path.is_file():
                os.truncate(path, self._num_read)
            if not self._num_read:
                self._append_line(self._header)
        self._last = time.monotonic()

    def wait_for(self, indices: Sequence[int], *, closed: Event | None = None) -> None:
        """Until these questions are answered, by another thread or process.

        Args:
            indices: of questions.
            closed: the caller's own reason to wait no longer.

        Raises:
            AnswersEndedError: ``closed`` is set.
            BaseException: what ``end`` was told.
        """
        closed = closed or Event()
        while not all(index in self.answers for index in indices):
            if self._error is not None:
                raise self._error
            if closed.wait(_POLL_S):
                raise AnswersEndedError
            if not self._is_mine:
                self._read_on()

    def end(self, error: BaseException) -> None:
        """No more answers come: raise this where one is waited for."""
        self._error = error

    def append(self, index: int, token_ids: Sequence[int]) -> None:
        """Keep the answer to one question, at once."""
        now = time.monotonic()
        took, self._last = now - self._last, now
        self.seconds += took
        self._append_line({"index": index, "token_ids": list(token_ids), "seconds": round(took, 3)})
        # Behind the line: what is trained on must be there when the job goes on.
        self.answers[index] = tuple(token_ids)

    def _append_line(self, line: object) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")

    def _read_on(self) -> None:
        """Take the whole lines that were not read yet."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._num_read)
            text = file.read()
        lines = text[: text.rfind(b"\n") + 1].splitlines(keepends=True)
        try:
            for line in lines:
                row = json.loads(line)
                if not self._num_read:
                    self._check(row)
                else:
                    self.answers[int(row["index"])] = tuple(row["token_ids"])
                    self.seconds += float(row["seconds"])
                self._num_read += len(line)
        except (ValueError, KeyError, TypeError) as error:
            raise RunMismatchError(f"{self._path} cannot be read: {error!r}") from error

    def _check(self, header: object) -> None:
        if header != self._header:
            raise RunMismatchError(
                f"{self._path} keeps answers of another target, prompt set or setting; choose "
                "another folder or remove it"
            )


async def regenerate(
    engine: Engine,
    questions: Sequence[Question],
    log: AnswerLog,
    *,
    max_tokens: int,
    seed: int,
    num_concurrent: int,
    progress: Callable[[str], None],
    order: Sequence[int] | None = None,
) -> None:
    """Have every question answered that the log has no answer to.

    Args:
        engine: the target's; a deterministic one gives the same answers however often the work is
            interrupted.
        questions: their places in the sequence are their numbers in the log.
        log: takes the answers.
        max_tokens: of one answer.
        seed: each question's own follows from it and its number.
        num_concurrent: questions in flight.
        progress: gets short lines for a person to read.
        order: in which questions are asked; all of them.

    Raises:
        EngineError: a question cannot be answered; the others in flight are dropped.
    """
    asked = range(len(questions)) if order is None else order
    waiting = iter([index for index in asked if index not in log.answers])
    pace = Pace("answers", len(questions), progress, done=len(log.answers))

    async def work(indices: Iterator[int]) -> None:
        for index in indices:
            request = GenerationRequest(
                request_id=f"question-{index}",
                prompt_token_ids=questions[index].prompt_token_ids,
                sampling=SamplingParams(
                    max_tokens=max_tokens,
                    seed=_seed(seed, index),
                    temperature=questions[index].temperature,
                ),
            )
            token_ids: list[int] = []
            async for delta in engine.generate(request):
                token_ids += delta.token_ids
            log.append(index, token_ids)
            pace.advance(len(token_ids))

    workers = [asyncio.ensure_future(work(waiting)) for _ in range(num_concurrent)]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def _seed(seed: int, index: int) -> int:
    return int.from_bytes(blake2b(f"{seed}/{index}".encode(), digest_size=8).digest())
