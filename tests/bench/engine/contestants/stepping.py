"""Timing of engines that are driven step by step. Standard library only."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class SteppedEngine(ABC):
    """An engine that computes one step when it is asked to."""

    def __init__(self) -> None:
        self._num_requests = 0

    @abstractmethod
    def add(self, number: int, prompt: list[int], num_new_tokens: int) -> None:
        """Take a request: greedy, never ending early."""

    @abstractmethod
    def step(self) -> Iterable[int]:
        """Compute; numbers of the requests that have at least one token now."""

    @abstractmethod
    def is_busy(self) -> bool:
        """Whether a request is unfinished."""

    def generate(self, prompts: list[list[int]], num_new_tokens: int) -> tuple[float, float]:
        """See ``protocol.Contestant``."""
        started = time.perf_counter()
        waiting = {self._add(prompt, num_new_tokens) for prompt in prompts}
        first = started
        while self.is_busy():
            had_waiting = bool(waiting)
            waiting.difference_update(self.step())
            if had_waiting and not waiting:
                first = time.perf_counter()
        return first - started, (time.perf_counter() - first) / (num_new_tokens - 1)

    def arrivals(
        self, prompts: list[list[int]], interval_s: float, num_new_tokens: int
    ) -> list[float]:
        """See ``protocol.Contestant``."""
        started = time.perf_counter()
        due = [started + number * interval_s for number in range(len(prompts))]
        due_of: dict[int, float] = {}
        found: dict[int, float] = {}
        while len(due_of) < len(prompts) or self.is_busy():
            while len(due_of) < len(prompts) and due[len(due_of)] <= time.perf_counter():
                place = len(due_of)
                due_of[self._add(prompts[place], num_new_tokens)] = due[place]
            if self.is_busy():
                for number in self.step():
                    found.setdefault(number, time.perf_counter() - due_of[number])
            else:
                time.sleep(max(0.0, due[len(due_of)] - time.perf_counter()))
        return [found[number] for number in due_of]

    def _add(self, prompt: list[int], num_new_tokens: int) -> int:
        self._num_requests += 1
        self.add(self._num_requests, prompt, num_new_tokens)
        return self._num_requests
