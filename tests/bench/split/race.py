"""Answers the same prompts in all modes, in alternation."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.types import GenerationRequest, SamplingParams, SpeculationStats
from tests.bench.split.modes import Mode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.base import Engine
    from tests.bench.split.modes import Modes

_SEED = 11
_numbers = count()


class Answer(NamedTuple):
    """One request's.

    Attributes:
        first_at: when its first tokens came.
        num_first: how many those were.
        num_steps: that gave tokens after those.
    """

    token_ids: tuple[int, ...]
    stats: SpeculationStats
    first_at: float
    last_at: float
    num_first: int
    num_steps: int


@dataclass(slots=True)
class Tally:
    """What one mode gave.

    Attributes:
        seconds_per_token: one per repetition, over the whole batch, from the first token on.
        stalls_s: what speculation took of each step.
    """

    seconds_per_token: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    stalls_s: list[float] = field(default_factory=list)

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """All answers, in the order asked."""
        return [answer.token_ids for answer in self.answers]

    def total(self, name: str) -> int:
        """The sum of one of the requests' counters."""
        return sum(getattr(answer.stats, name) for answer in self.answers)

    @property
    def tokens_per_step(self) -> float:
        """Of one sequence."""
        num_tokens = sum(len(answer.token_ids) - answer.num_first for answer in self.answers)
        return num_tokens / max(1, sum(answer.num_steps for answer in self.answers))


class Race:
    """One engine whose requests may be drafted for in any mode.

    Args:
        endpoint: of the draft replica.
        tenant_key: whose pages the prompts' are.
        earlier: outputs, of other prompts, that every tenant had before.
    """

    def __init__(
        self,
        engine: Engine,
        modes: Modes,
        endpoint: str,
        tenant_key: bytes,
        earlier: Sequence[Sequence[int]] = (),
    ) -> None:
        self._engine = engine
        self._modes = modes
        self._endpoint = endpoint
        self._tenant_key = tenant_key
        self._earlier = earlier

    async def run(
        self,
        prompts: Sequence[Sequence[int]],
        modes: Sequence[Mode],
        batch: int,
        repetitions: int,
        num_new_tokens: int,
        temperatures: Sequence[float] = (0.0, 0.8),
    ) -> dict[Mode, Tally]:
        """Answer ``batch`` prompts at a time, each repetition others, in every mode.

        Their pages are cached before the clock runs: what is measured is decoding. Seed and
        temperature are the prompt's, whatever else is in the batch.
        """
        tallies = {mode: Tally() for mode in modes}
        for repetition in range(repetitions):
            places = [(repetition * batch + n) % len(prompts) for n in range(batch)]
            chosen = [
                (
                    prompts[place],
                    SamplingParams(
                        max_tokens=num_new_tokens,
                        temperature=temperatures[place % len(temperatures)],
                        seed=_SEED + place,
                        ignore_eos=True,
                    ),
                )
                for place in places
            ]
            short = [(prompt, replace(sampling, max_tokens=1)) for prompt, sampling in chosen]
            # A head reads prompts as they are computed.
            await self._batch(short, Mode.PLAIN if self._modes.head is None else Mode.COLOCATED)
            turn = repetition % len(modes)
            for mode in (*modes[turn:], *modes[:turn]):
                answers = await self._batch(chosen, mode)
                tally = tallies[mode]
                tally.answers += answers
                tally.stalls_s += self._modes.stalls_s
                num_tokens = sum(len(each.token_ids) - each.num_first for each in answers)
                began = min(each.first_at for each in answers)
                seconds = max(each.last_at for each in answers) - began
                tally.seconds_per_token.append(seconds / max(1, num_tokens))
        return tallies

    async def _batch(
        self, asked: Sequence[tuple[Sequence[int], SamplingParams]], mode: Mode
    ) -> list[Answer]:
        self._modes.mode = mode
        self._modes.stalls_s = []
        # A tenant of its own has no other outputs to draft from; pages go by the tenant's key.
        tenant = f"bench-{next(_numbers)}"
        self._modes.teach(tenant, self._earlier)
        return await asyncio.gather(*(self._answer(*each, mode, tenant) for each in asked))

    async def _answer(
        self, prompt: Sequence[int], sampling: SamplingParams, mode: Mode, tenant: str
    ) -> Answer:
        request_id = f"request-{next(_numbers)}"
        request = GenerationRequest(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=sampling,
            tenant=tenant,
            tenant_key=self._tenant_key,
            speculation=mode is not Mode.PLAIN,
        )
        self._modes.attach(request_id, self._endpoint)
        tokens: list[int] = []
        stats = SpeculationStats()
        first_at, num_first, num_steps = 0.0, 0, -1
        try:
            async for delta in self._engine.generate(request):
                if delta.token_ids:
                    tokens += delta.token_ids
                    num_steps += 1
                    if not num_steps:
                        first_at, num_first = time.perf_counter(), len(tokens)
                stats = delta.speculation or stats
        finally:
            self._modes.detach(request_id)
        return Answer(tuple(tokens), stats, first_at, time.perf_counter(), num_first, num_steps)
