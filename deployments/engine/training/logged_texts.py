"""Training texts that are still being written: the answers of a log, in an order of their own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from threading import Event
from typing import TYPE_CHECKING, overload

from deployments.engine.training.capture import AnsweredPrompt

if TYPE_CHECKING:
    from deployments.engine.training.answers import AnswerLog, Question


class LoggedTexts(Sequence[AnsweredPrompt]):
    """One text for each question; whoever wants one waits until it is answered.

    Attributes:
        order: the question of each text.
        closed: set by whoever wants no more; those who wait then give up.
    """

    def __init__(
        self, questions: Sequence[Question], log: AnswerLog, *, max_length: int, seed: int
    ) -> None:
        """Order the questions, so that a group of texts is like all of them.

        Args:
            questions: the log's first ones.
            log: of their answers.
            max_length: tokens of a text; the rest is cut off.
            seed: of the order.
        """
        self._questions = questions
        self._log = log
        self._max_length = max_length
        self.order = list(range(len(questions)))
        random.Random(f"texts/{seed}").shuffle(self.order)  # noqa: S311 - no secret
        self.closed = Event()

    def __len__(self) -> int:
        """Questions, answered or not."""
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> AnsweredPrompt: ...

    @overload
    def __getitem__(self, index: slice) -> list[AnsweredPrompt]: ...

    def __getitem__(self, index: int | slice) -> AnsweredPrompt | list[AnsweredPrompt]:
        """One text, or some."""
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        question = self.order[index]
        self._log.wait_for([question], closed=self.closed)
        prompt = self._questions[question].prompt_token_ids
        return AnsweredPrompt((*prompt, *self._log.answers[question]), len(prompt))

    def lengths_of(self, texts: range) -> list[int]:
        """Tokens of each of these texts; 0 for one that holds nothing of an answer."""
        self._log.wait_for([self.order[index] for index in texts], closed=self.closed)
        found = [self[index] for index in texts]
        return [
            min(len(text.token_ids), self._max_length) if text.fits(self._max_length) else 0
            for text in found
        ]
