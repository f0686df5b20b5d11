"""Clients that never stop asking, and compare every answer with the one they know."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import openai

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from cluster.demo.clients import DemoClients


class Asked(NamedTuple):
    """A request that can be repeated to the letter."""

    prompt: str
    temperature: float
    seed: int


class SteadyLoad:
    """A few clients at once, round after round over the same requests, while a ``with`` block runs.

    Attributes:
        num_equal: answers with the text of plain decoding.
        problems: answers that failed or had another text, and how.
        sums: of what answers say of their speculation.
    """

    def __init__(
        self, clients: DemoClients, requests: Sequence[Asked], *, max_tokens: int, at_once: int
    ) -> None:
        self.num_equal = 0
        self.problems: list[str] = []
        self.sums: Counter[str] = Counter()
        self._clients = clients
        self._requests = requests
        self._max_tokens = max_tokens
        self._at_once = at_once
        self._lock = threading.Lock()
        self._num_begun = 0
        self._is_over = threading.Event()
        self._pool = ThreadPoolExecutor(at_once, "client")
        self._texts: dict[Asked, str] = {}

    def learn_plain_texts(self) -> None:
        """Ask everything once without speculation; these are the texts to come."""

        def ask(asked: Asked) -> str:
            return self._ask(asked, speculation=False)

        self._texts = dict(zip(self._requests, self._pool.map(ask, self._requests), strict=True))

    def __enter__(self) -> Self:
        for _ in range(self._at_once):
            self._pool.submit(self._go_on_asking)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._pool.shutdown(wait=True)

    def _go_on_asking(self) -> None:
        while not self._is_over.is_set():
            with self._lock:
                asked = self._requests[self._num_begun % len(self._requests)]
                self._num_begun += 1
            try:
                text = self._ask(asked, speculation=True)
                problem = None if text == self._texts[asked] else f"another text: {asked}"
            except (openai.OpenAIError, KeyError) as error:
                problem = f"{type(error).__name__}: {asked}"
            with self._lock:
                if problem is None:
                    self.num_equal += 1
                else:
                    self.problems.append(problem)

    def _ask(self, asked: Asked, *, speculation: bool) -> str:
        answer = self._clients.over_http(
            asked.prompt,
            temperature=asked.temperature,
            seed=asked.seed,
            max_tokens=self._max_tokens,
            speculation=speculation,
        )
        with self._lock:
            self.sums.update(
                {
                    name: value
                    for name, value in answer.speculation.items()
                    if isinstance(value, int)
                }
            )
        return answer.text
