"""Features that go from the running target to the training through memory, never through a disk.

The target computes in a thread of its own what the training will ask for next, as far ahead as a
bounded queue allows. A text's features are a function of its tokens alone, so a run that was
interrupted has them made again and goes on to the same bits.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from torch import Tensor

    from deployments.engine.training.batches import FeatureText
    from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture


class QueueClosedError(Exception):
    """Nobody takes from the queue any more."""


@dataclass(slots=True)
class QueueStats:
    """What went through a queue.

    Beside it, one text is in the target's hands, and those of one step are in the training's.

    Attributes:
        max_bytes: the queue's bound.
        most_bytes: that ever waited at once; above the bound only if one text alone is.
        num_put: texts that the target computed.
        num_taken: texts that the training got.
        num_tokens: of those that were computed.
        compute_s: that the target computed.
        full_s: that it waited for room.
        empty_s: that the training waited for a text.
    """

    max_bytes: int
    most_bytes: int = 0
    num_put: int = 0
    num_taken: int = 0
    num_tokens: int = 0
    compute_s: float = 0.0
    full_s: float = 0.0
    empty_s: float = 0.0


@dataclass(slots=True)
class _Ending:
    """Behind the last text: why there are no more."""

    error: BaseException | None


@dataclass(slots=True)
class TextQueue:
    """Texts in order, between one thread that puts and one that takes."""

    stats: QueueStats
    _waiting: deque[FeatureText | _Ending] = field(default_factory=deque)
    _num_bytes: int = 0
    _is_closed: bool = False
    _changed: Condition = field(default_factory=Condition)

    def put(self, text: FeatureText) -> None:
        """Wait for room, then add a text.

        Raises:
            QueueClosedError: ``close`` was called.
        """
        size, began = text.num_bytes, time.monotonic()
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._is_closed
                    or not self._num_bytes
                    or self._num_bytes + size <= self.stats.max_bytes
                )
            )
            if self._is_closed:
                raise QueueClosedError
            self._waiting.append(text)
            self._num_bytes += size
            self.stats.full_s += time.monotonic() - began
            self.stats.most_bytes = max(self.stats.most_bytes, self._num_bytes)
            self.stats.num_put += 1
            self.stats.num_tokens += text.num_tokens
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Say that no further text comes, and why if that is an error."""
        with self._changed:
            self._waiting.append(_Ending(error))
            self._changed.notify_all()

    def close(self) -> None:
        """Say that no further text is wanted, and let go of those that wait."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._num_bytes = 0
            self._changed.notify_all()

    def __iter__(self) -> Iterator[FeatureText]:
        """Take text after text until the other side ends; its error is raised here."""
        while True:
            began = time.monotonic()
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                taken = self._waiting.popleft()
                self.stats.empty_s += time.monotonic() - began
                if isinstance(taken, _Ending):
                    if taken.error is not None:
                        raise taken.error
                    return
                self._num_bytes -= taken.num_bytes
                self.stats.num_taken += 1
                self._changed.notify_all()
            yield taken


class OnlineTexts:
    """Training texts whose features are computed when they are wanted.

    Attributes:
        stats: of all queues so far.
    """

    def __init__(
        self,
        capture: FeatureCapture,
        answered: Sequence[AnsweredPrompt],
        max_bytes: int,
        closed: Event | None = None,
    ) -> None:
        """Nothing is computed yet.

        Args:
            capture: of the target; used by one thread at a time.
            answered: every one that is asked for has an answer within the capture's length.
            max_bytes: of features that wait.
            closed: is set when a stream ends, for whoever waits on its behalf.
        """
        self._capture = capture
        self._answered = answered
        self._closed = closed or Event()
        self.stats = QueueStats(max_bytes)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text, in order."""
        return [self._capture.num_tokens(text) for text in self._answered]

    def __iter__(self) -> Iterator[FeatureText]:
        """All texts, in order, computed here and now; not while a stream runs."""
        return self._capture.texts(self._answered)

    def answers(self) -> Iterator[Tensor]:
        """The tokens of each text's answer; nothing is computed."""
        for text, length in zip(self._answered, self.lengths, strict=True):
            yield torch.tensor(text.token_ids[text.prompt_length : length], dtype=torch.int32)

    def stream(self, indices: Iterable[int]) -> Generator[FeatureText, None, None]:
        """Texts by index, computed ahead by another thread until the iterator is closed.

        One stream at a time.
        """
        queue = TextQueue(self.stats)
        self._closed.clear()
        thread = Thread(
            target=self._compute, args=(indices, queue), name="online-features", daemon=True
        )
        thread.start()
        try:
            yield from queue
        finally:
            self._closed.set()
            queue.close()
            thread.join()

    def _compute(self, indices: Iterable[int], queue: TextQueue) -> None:
        try:
            for index in indices:
                began = time.monotonic()
                (text,) = self._capture.texts([self._answered[index]])
                self.stats.compute_s += time.monotonic() - began
                queue.put(text)
        except QueueClosedError:
            return
        except BaseException as error:  # noqa: BLE001 - the training has to hear of any of them
            queue.end(error)
        else:
            queue.end()
