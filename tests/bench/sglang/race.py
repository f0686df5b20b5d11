"""Asks all contestants the same, in alternation."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.sglang.field import NONE, Contestant, NotRunningError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_CALM_S = 0.1
"""Between two contestants, so that drafters have read what the last one committed."""


class Question(NamedTuple):
    """Prompts that are answered together."""

    kind: str
    prompts: Sequence[Sequence[int]]

    @property
    def batch(self) -> int:
        """How many."""
        return len(self.prompts)


class Answers(NamedTuple):
    """What a contestant said to one question: as ``SGLangContestant.generate``."""

    found: list[dict[str, Any]]

    @property
    def tokens_per_s(self) -> float:
        """Of all sequences together, from the first token on."""
        num_tokens = sum(len(each["token_ids"]) - each["num_first"] for each in self.found)
        began = min(each["first_at"] for each in self.found)
        return num_tokens / (max(each["last_at"] for each in self.found) - began)

    @property
    def texts(self) -> list[list[int]]:
        """In the order asked."""
        return [each["token_ids"] for each in self.found]


def questions(
    prompts: Mapping[str, Sequence[Sequence[int]]], plan: Sequence[tuple[str, int, int]]
) -> list[Question]:
    """Questions of which no prompt is asked twice, kinds and batches mixed.

    What was asked before is known to those that draft from earlier outputs.

    Args:
        prompts: by kind.
        plan: kind, batch, how often.
    """
    left = {kind: iter(own) for kind, own in prompts.items()}
    piles = [
        [Question(kind, [next(left[kind]) for _ in range(batch)]) for _ in range(times)]
        for kind, batch, times in plan
    ]
    mixed = []
    while any(piles):
        mixed += [pile.pop(0) for pile in piles if pile]
    return mixed


def race(
    contestants: Sequence[Contestant],
    asked: Sequence[Question],
    warm_up: Sequence[Question],
    num_new_tokens: int,
    limit_s: float,
    say: Callable[[str], None],
) -> tuple[dict[str, list[Answers]], dict[str, str]]:
    """Put every question to everybody, one after the other, whoever begins.

    Their prompts are cached before the clock runs: what is measured is decoding.

    Args:
        contestants: ready.
        asked: the questions.
        warm_up: asked first, not kept.
        num_new_tokens: of every answer.
        limit_s: after which no question is asked.
        say: told how far it is.

    Returns:
        By contestant its answers, those to the first questions; and who ended, with the reason.
    """
    answers: dict[str, list[Answers]] = {each.entry.name: [] for each in contestants}
    dead: dict[str, str] = {}
    started = time.monotonic()
    try:
        for number, question in enumerate([*warm_up, *asked]):
            is_kept = number >= len(warm_up)
            if is_kept and time.monotonic() - started > limit_s:
                say(f"out of time after {number - len(warm_up)} questions")
                break
            found: dict[str, Answers] = {}
            for contestant in _rotated(contestants, number):
                name = contestant.entry.name
                if name not in dead:
                    try:
                        found[name] = _put(contestant, question, num_new_tokens)
                    except NotRunningError as error:
                        dead[name] = str(error)
            if is_kept:
                for name, own in found.items():
                    answers[name].append(own)
                say(f"{question.kind}, batch {question.batch}: {_speeds(found)}")
    except KeyboardInterrupt:
        say("ended early; what was measured is reported")
    return answers, dead


def _rotated(contestants: Sequence[Contestant], turn: int) -> Iterator[Contestant]:
    first = turn % len(contestants)
    yield from (*contestants[first:], *contestants[:first])


def _put(contestant: Contestant, question: Question, num_new_tokens: int) -> Answers:
    prompts = [list(prompt) for prompt in question.prompts]
    contestant.ask(do="generate", prompts=prompts, num_new_tokens=1)
    time.sleep(_CALM_S)
    return Answers(contestant.ask(do="generate", prompts=prompts, num_new_tokens=num_new_tokens))


def _speeds(found: Mapping[str, Answers]) -> str:
    return ", ".join(f"{name} {own.tokens_per_s:.1f}" for name, own in found.items())


def rows_of(
    asked: Sequence[Question], answers: Mapping[str, Sequence[Answers]]
) -> list[dict[str, Any]]:
    """One row per kind, batch and contestant.

    A ratio is that to the contestant without drafts at the very same question; medians are over
    questions.
    """
    rows = []
    for kind, batch in dict.fromkeys((each.kind, each.batch) for each in asked):
        for name, own in answers.items():
            pairs = [
                (answer, plain)
                for question, answer, plain in zip(asked, own, answers[NONE], strict=False)
                if (question.kind, question.batch) == (kind, batch)
            ]
            if pairs:
                rows.append({"prompts": kind, "batch": batch, "contestant": name} | _row(pairs))
    return rows


def _row(pairs: Sequence[tuple[Answers, Answers]]) -> dict[str, Any]:
    found = [each for answer, _ in pairs for each in answer.found]
    num_steps = sum(each["num_steps"] for each in found)
    num_drafted_steps = sum(each["num_drafted_steps"] for each in found)
    num_accepted = sum(each["num_accepted"] for each in found)
    ratios = [answer.tokens_per_s / plain.tokens_per_s for answer, plain in pairs]
    return {
        "questions": len(pairs),
        "tokens_per_s": median(answer.tokens_per_s for answer, _ in pairs),
        "ratio": median(ratios),
        "least_ratio": min(ratios),
        "accept_length": 1 + num_accepted / num_drafted_steps if num_drafted_steps else None,
        "tokens_per_step": sum(len(each["token_ids"]) - 1 for each in found) / max(1, num_steps),
        "drafted_share": num_drafted_steps / max(1, num_steps),
        "drafted": sum(each["num_drafted"] for each in found),
        "accepted": num_accepted,
        "from_pool": sum(each["num_from_pool"] for each in found),
        "same_text": all(answer.texts == plain.texts for answer, plain in pairs),
        "ratios": ratios,
    }
