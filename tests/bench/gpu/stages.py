"""What each contestant is asked: speed by batch, and the first token of long prompts again."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.engine.protocol import prompt
from tests.bench.gpu.field import wait_saved
from tests.bench.split.prompts import prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.bench.gpu.field import Contestant, Entry

_PAGE = 64
_SAVE_TIMEOUT_S = 120.0


class Plan(NamedTuple):
    """How much is asked.

    Attributes:
        batches: sequences at once.
        num_tokens: of an answer.
        rounds: of each batch.
        kinds: of questions.
        long_prompt: tokens of a prompt whose first token is waited for.
        num_long: such prompts.
    """

    batches: tuple[int, ...]
    num_tokens: int
    rounds: int
    kinds: tuple[str, ...]
    long_prompt: int
    num_long: int

    @classmethod
    def whole(cls) -> Plan:
        """For figures."""
        return cls((1, 8, 32), 256, 3, ("MT-bench", "repeating"), 3500, 8)

    @classmethod
    def quick(cls) -> Plan:
        """For the way's sake."""
        return cls((1, 2), 12, 1, ("repeating",), 400, 1)


def measure(
    contestant: Contestant,
    entry: Entry,
    plan: Plan,
    chat: Callable[[str], list[int]],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Ask a contestant everything.

    Args:
        contestant: running.
        entry: which one.
        plan: how much.
        chat: a question's tokens.
        say: told of progress.

    Returns:
        Rows of figures; those of a batch are medians of its rounds.

    Raises:
        NotRunningError: it has ended.
    """
    texts = prompts()
    warm_up = [chat(text) for text in texts["GSM8K"][: max(plan.batches)]]
    for batch in plan.batches:
        contestant.ask(do="generate", prompts=warm_up[:batch], num_new_tokens=8)
    rows = []
    for kind in plan.kinds:
        questions = [chat(text) for text in texts[kind]]
        for batch in plan.batches:
            rounds = [
                _speed(contestant, _of(questions, number, batch), plan.num_tokens)
                for number in range(plan.rounds)
            ]
            row = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
            rows.append({"what": kind, "batch": batch} | row)
            say(f"{entry.name}: {kind}, batch {batch}: {row['tokens_per_s']:.1f} tokens/s")
    rows += _first_tokens(contestant, entry, plan, say)
    return rows


def _of(questions: Sequence[list[int]], number: int, batch: int) -> list[list[int]]:
    """A batch of them, starting elsewhere each round; some come twice where there are too few."""
    return [questions[(number * batch + place) % len(questions)] for place in range(batch)]


def _speed(contestant: Contestant, asked: list[list[int]], num_tokens: int) -> dict[str, float]:
    contestant.ask(do="flush")
    told = contestant.ask(do="generate", prompts=asked, num_new_tokens=num_tokens)
    answers = told["answers"]
    behind = [(len(one["token_ids"]) - one["num_first"], one["num_steps"]) for one in answers]
    num_steps = sum(steps for _, steps in behind)
    return {
        "tokens_per_s": sum(len(one["token_ids"]) for one in answers) / told["took_s"],
        "tokens_per_step": sum(tokens for tokens, _ in behind) / max(1, num_steps),
        "first_token_s": statistics.median(one["first_s"] for one in answers),
        "tier_tokens": sum(one["num_tier_cached"] for one in answers),
    }


def _first_tokens(
    contestant: Contestant, entry: Entry, plan: Plan, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Of long prompts: computed, and again once the replica has forgotten them."""
    asked = [prompt(plan.long_prompt, 1000 + number) for number in range(plan.num_long)]
    num_saved = contestant.ask(do="num_saved")
    rows = []
    for what in ("long prompt", "long prompt again"):
        contestant.ask(do="flush")
        rounds = [_speed_of_first(contestant, one) for one in asked]
        row = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        rows.append({"what": what, "batch": 1} | row)
        say(f"{entry.name}: {what}: {row['first_token_s'] * 1e3:.1f} ms to the first token")
        if what == "long prompt" and entry.is_tiered:
            num_pages = plan.num_long * (plan.long_prompt // _PAGE)
            if not wait_saved(contestant, num_saved + num_pages, _SAVE_TIMEOUT_S):
                say(f"{entry.name}: not all pages have reached the tier")
    return rows


def _speed_of_first(contestant: Contestant, asked: list[int]) -> dict[str, float]:
    told = contestant.ask(do="generate", prompts=[asked], num_new_tokens=2)
    (answer,) = told["answers"]
    return {
        "tokens_per_s": 0.0,
        "tokens_per_step": 1.0,
        "first_token_s": answer["first_s"],
        "tier_tokens": answer["num_tier_cached"],
    }
