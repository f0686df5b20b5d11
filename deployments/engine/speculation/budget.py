"""How much to draft: pure functions of what was accepted so far and of who is waiting."""

from __future__ import annotations

import math
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_Row: TypeAlias = tuple[float, int]
"""A draft token: its chance, and the place of its sequence."""

INITIAL_ACCEPTANCE = 0.75


def update_acceptance(acceptance: float, was_right: bool, weight: float) -> float:
    """The estimate of a draft token's chance, given that all before it were accepted.

    Args:
        acceptance: the estimate so far.
        was_right: what became of one that was put to the test.
        weight: of that one.
    """
    # In this form equal values stay equal; the sum of two products would drift above 1.
    return min(1.0, max(0.0, acceptance + weight * (was_right - acceptance)))


class Choice(NamedTuple):
    """What to verify in a step.

    Attributes:
        lengths: per sequence the draft tokens to verify, from the first.
        num_yielded: draft tokens that would pay and are left out for somebody's target.
        num_met: targets that the step is expected to meet.
        num_missed: those that it is not.
    """

    lengths: list[int]
    num_yielded: int = 0
    num_met: int = 0
    num_missed: int = 0


class _Step(NamedTuple):
    """What the choice is about, see ``choose``."""

    num_rows: int
    num_tokens: float
    seconds_of: Callable[[int], float]
    targets_s: Mapping[int, float]


class _Found(NamedTuple):
    """The best number of rows to take from the front of a list; the later, the better."""

    num_met: int
    rate: float
    num_taken: int


def choose(
    chances: Sequence[Sequence[float]],
    num_rows: int,
    num_tokens: int,
    seconds_of: Callable[[int], float],
    targets_s: Mapping[int, float] | None = None,
) -> Choice:
    """How many of the draft tokens at hand to verify, so that tokens come fastest.

    Every draft token is one more row of the step and gives a token with the chance that it and all
    before it are accepted. Rows of all sequences compete: they are added by falling chance, and
    the number that promises most tokens per second wins; often it is none (goodput: TurboSpec,
    arXiv:2406.14066).

    A sequence may have a target: seconds per token. A step meets it if it takes no longer than that
    for each token the sequence is expected to get. No sequence misses its target because of rows of
    others. Of the choices that leaves, those slower than the plain step are out; the one that meets
    most targets wins, then the one with most tokens per second. Rows that targets need are tried
    first, too (AdaServe, arXiv:2501.12162).

    Args:
        chances: per sequence, of its first, second, ... draft token; never rising.
        num_rows: of the step without drafts.
        num_tokens: what the step gives without drafts.
        seconds_of: what a step of so many rows takes; never falling.
        targets_s: by place in ``chances``; other keys are of sequences that get one token in any
            case.
    """
    step = _Step(num_rows, num_tokens, seconds_of, targets_s or {})
    rows = _likeliest_first(chances)
    best = fastest = _best(step, rows)
    if step.targets_s:
        fastest = _best(step._replace(targets_s={}), rows)
        if first := _needed_first(step, chances, rows):
            found = _best(step, first)
            if found[:2] > best[:2]:
                best, rows = found, first
    lengths = [0] * len(chances)
    for _, index in rows[: best.num_taken]:
        lengths[index] += 1
    num_yielded = max(0, fastest.num_taken - best.num_taken)
    return Choice(lengths, num_yielded, best.num_met, len(step.targets_s) - best.num_met)


def goodput(
    chances: Sequence[Sequence[float]],
    num_rows: int,
    num_tokens: int,
    seconds_of: Callable[[int], float],
) -> float:
    """Tokens per second of what ``choose`` takes where nobody has a target; its arguments."""
    step = _Step(num_rows, num_tokens, seconds_of, {})
    return _best(step, _likeliest_first(chances)).rate


def _likeliest_first(chances: Sequence[Sequence[float]]) -> list[_Row]:
    rows = ((chance, index) for index, own in enumerate(chances) for chance in own)
    return sorted(rows, key=lambda row: -row[0])


def _best(step: _Step, rows: Sequence[_Row]) -> _Found:
    """The choice among the first none, one, two, ... of ``rows``."""
    num_rows, expected, seconds_of, targets_s = step
    plain_s = seconds_of(num_rows)
    plain_rate = best_rate = expected / plain_s
    # Sequences that the step may not make miss, and how long it may take for their sake.
    limits = {index: target for index, target in targets_s.items() if plain_s <= target}
    shortest = [(target, index) for index, target in limits.items()]
    heapify(shortest)
    longest_s = shortest[0][0] if shortest else math.inf
    own = dict.fromkeys(targets_s, (0, 1.0))
    best, most_met = 0, len(limits)
    for count, (chance, index) in enumerate(rows, start=1):
        expected += chance
        if index in own:
            length, gain = own[index]
            own[index] = length, gain = length + 1, gain + chance
            limit = targets_s[index] * gain
            if index in limits or seconds_of(num_rows + length) <= limit:
                limits[index] = limit
                heappush(shortest, (limit, index))
                while shortest[0][0] != limits[shortest[0][1]]:
                    heappop(shortest)
                longest_s = shortest[0][0]
        seconds = seconds_of(num_rows + count)
        rate = expected / seconds
        if seconds > longest_s or rate < plain_rate:
            continue
        if rate > best_rate or len(limits) > most_met:
            best, best_rate, most_met = count, rate, len(limits)
    return _Found(most_met, best_rate, best)


def _needed_first(
    step: _Step, chances: Sequence[Sequence[float]], rows: Sequence[_Row]
) -> list[_Row]:
    """The rows in the order in which those come first that a target needs; empty if none does."""
    needed = {
        index: _num_needed(step, chances[index], target)
        for index, target in step.targets_s.items()
        if 0 <= index < len(chances)
    }
    first: list[_Row] = []
    others: list[_Row] = []
    for row in rows:
        left = needed.get(row[1], 0)
        needed[row[1]] = left - 1
        (first if left > 0 else others).append(row)
    return first + others if first else []


def _num_needed(step: _Step, own: Sequence[float], target_s: float) -> int:
    """How many of its draft tokens a sequence needs to meet its target in a step of its own."""
    gain = 1.0
    for length in range(len(own) + 1):
        if step.seconds_of(step.num_rows + length) <= target_s * gain:
            return length
        if length < len(own):
            gain += own[length]
    return 0
