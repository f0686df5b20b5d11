"""What the clients of the soak ask: everything an engine offers, in random mixture."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from deployments.engine.types import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

_TENANTS = ("a", "b", "b", "c", "c", "c", "c")
_STOP_STRINGS = (".\n", "the page", " and a")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One client's call.

    Attributes:
        requests: one per choice.
        leaves_after_tokens: output tokens of a choice after which the client has enough of it.
        leaves_by: how it leaves: it asks for the end, or stops to read.
    """

    requests: tuple[GenerationRequest, ...]
    leaves_after_tokens: int | None
    leaves_by: Literal["abort", "close"]


class Workload:
    """Calls over a text. One seed always gives the same calls."""

    def __init__(self, text_ids: Sequence[int], seed: int) -> None:
        """Cut prompts from a text.

        Args:
            text_ids: real text, so that local drafters find something; 2000 tokens or more.
            seed: of everything random.
        """
        self._text_ids = tuple(text_ids)
        self._rng = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self._num_calls = 0

    def next(self, now: float) -> Call:
        """The next call.

        Args:
            now: seconds since the epoch, for deadlines.
        """
        rng = self._rng
        self._num_calls += 1
        tenant = rng.choice(_TENANTS)
        prompt = self._prompt(tenant)
        sampling = self._sampling()
        num_choices = rng.choices((1, 2, 4), (0.85, 0.1, 0.05))[0]
        patience_s = rng.choices((rng.uniform(2, 10), 60.0), (0.2, 0.8))[0]
        common = {
            "prompt_token_ids": prompt,
            "sampling": sampling,
            "tenant": tenant,
            "tenant_key": tenant.encode() * 32,
            "priority": rng.choices((0, 1), (0.2, 0.8))[0],
            "deadline": now + patience_s,
            "speculation": rng.random() < 0.8,
        }
        return Call(
            requests=tuple(
                GenerationRequest(
                    request_id=f"{self._num_calls}-{choice}", choice_index=choice, **common
                )
                for choice in range(num_choices)
            ),
            leaves_after_tokens=rng.randint(0, 40) if rng.random() < 0.15 else None,
            leaves_by=rng.choice(("abort", "close")),
        )

    def _prompt(self, tenant: str) -> tuple[int, ...]:
        """Mostly a tenant's own beginning, then something of the call's own."""
        rng = self._rng
        length = min(800, int(rng.lognormvariate(4.2, 0.9)) + 4)
        start = rng.randrange(len(self._text_ids) - length)
        own = self._text_ids[start : start + length]
        if rng.random() < 0.6:
            place = 200 * _TENANTS.index(tenant)
            return self._text_ids[place : place + 150] + own
        return own

    def _sampling(self) -> SamplingParams:
        rng = self._rng
        is_greedy = rng.random() < 0.4
        return SamplingParams(
            max_tokens=min(300, int(rng.lognormvariate(3.5, 0.8)) + 1),
            seed=rng.getrandbits(64),
            temperature=0.0 if is_greedy else rng.choice((0.7, 1.0)),
            top_k=rng.choice((0, 0, 40)),
            top_p=rng.choice((1.0, 0.9)),
            min_p=rng.choice((0.0, 0.0, 0.05)),
            repetition_penalty=rng.choice((1.0, 1.0, 1.1)),
            frequency_penalty=rng.choice((0.0, 0.0, 0.2)),
            logit_bias=((11, -5.0),) if rng.random() < 0.1 else (),
            stop_strings=_STOP_STRINGS if rng.random() < 0.2 else (),
            ignore_eos=rng.random() < 0.5,
            min_tokens=rng.choice((0, 0, 1)),
        )
