"""How much to draft: pure functions of what was accepted so far and of who is waiting."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


class Goodput(NamedTuple):
    """The best a step can do.

    Attributes:
        lengths: per sequence the draft tokens to verify, from the first.
        rate: tokens per second.
    """

    lengths: list[int]
    rate: float


def goodput(
    chances: Sequence[Sequence[float]],
    num_rows: int,
    num_tokens: int,
    seconds_of: Callable[[int], float],
) -> Goodput:
    """How many of the draft tokens at hand to verify, so that tokens come fastest.

    Every draft token is one more row of the step and gives a token with the chance that it and all
    before it are accepted. Rows of all sequences compete: they are added by falling chance, and
    the number that promises most tokens per second wins; often it is none (goodput: TurboSpec,
    arXiv:2406.14066).

    Args:
        chances: per sequence, of its first, second, ... draft token; never rising.
        num_rows: of the step without drafts.
        num_tokens: what the step gives without drafts.
        seconds_of: what a step of so many rows takes.
    """
    order = sorted(
        ((chance, index) for index, own in enumerate(chances) for chance in own),
        key=lambda item: -item[0],
    )
    best, expected = 0, float(num_tokens)
    best_rate = expected / seconds_of(num_rows)
    for count, (chance, _) in enumerate(order, start=1):
        expected += chance
        rate = expected / seconds_of(num_rows + count)
        if rate > best_rate:
            best, best_rate = count, rate
    lengths = [0] * len(chances)
    for _, index in order[:best]:
        lengths[index] += 1
    return Goodput(lengths, best_rate)
