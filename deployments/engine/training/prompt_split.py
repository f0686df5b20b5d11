"""Which prompts are trained on, and which only evaluations see."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

PromptIds = tuple[int, ...]


class PromptSplit(NamedTuple):
    """Prompts to train on, and prompts that only evaluations see; none is in both.

    Attributes:
        num_dropped: were too long, or are there already.
    """

    training: list[PromptIds]
    held_out: list[PromptIds]
    num_dropped: int


def split_prompts(
    prompts: Iterable[PromptIds],
    held_out: Iterable[PromptIds],
    *,
    num_held_out: int,
    max_prompt_tokens: int,
    seed: int,
    is_self_chat: bool = False,
) -> PromptSplit:
    """Decide which prompts are used, and which of them are held out.

    Args:
        prompts: all, in order.
        held_out: those that are chosen already; where there are none, some are drawn.
        num_held_out: to draw; never more than half.
        max_prompt_tokens: longer ones leave no room for an answer and are dropped.
        seed: of the draw.
        is_self_chat: there is nothing to train on among them, and nothing has to be held out.

    Raises:
        ValueError: nothing is left to train on.
    """
    offered = [list(prompts), list(held_out)]
    fitting = [[prompt for prompt in of if len(prompt) <= max_prompt_tokens] for of in offered]
    kept = dict.fromkeys(fitting[1])
    distinct = [prompt for prompt in dict.fromkeys(fitting[0]) if prompt not in kept]
    num_dropped = sum(map(len, offered)) - len(kept) - len(distinct)
    if is_self_chat:
        return PromptSplit([], list(kept), num_dropped)
    if not kept:
        count = min(num_held_out, len(distinct) // 2)
        kept = dict.fromkeys(random.Random(seed).sample(distinct, count))  # noqa: S311 - no secret
    training = [prompt for prompt in distinct if prompt not in kept]
    if not training or not kept:
        raise ValueError(
            "at least one prompt to train on and another one to hold out are needed, of at most "
            f"{max_prompt_tokens} tokens"
        )
    return PromptSplit(training, list(kept), num_dropped)
