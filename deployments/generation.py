"""The flow of one client request, the same for every surface: prompts in, text deltas out."""

from __future__ import annotations

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from deployments.choice_text import ChoiceText
from deployments.engine.types import GenerationRequest
from deployments.errors import ContextLengthError, RequestInvalidError, RequestTooLargeError
from deployments.merge import merge
from deployments.sampling import (
    UNCONSTRAINED,
    Constraints,
    build_sampling_params,
    check_prompt_token_ids,
)
from deployments.traffic_log import TrafficLog

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from deployments.accounting import RequestTotals
    from deployments.choice_text import PlacedLogprob
    from deployments.config import IngressConfig
    from deployments.engine.types import (
        FinishReason,
        StructuredOutput,
        TokenDelta,
        TokenLogprob,
    )
    from deployments.metrics import IngressMetrics
    from deployments.sampling import SamplingFields
    from deployments.target_client import TargetClient
    from deployments.tenants import Tenant
    from deployments.tokenizer import ChatTurn, Tokenizer

Given = TypeVar("Given")
Found = TypeVar("Found")

_INLINE_CHARS = 2048
"""So short a text takes a fraction of a millisecond. Handing it to a thread and back costs as much,
and far more while the event loop is busy: the thread then waits for the interpreter's lock."""
_PART_CHARS = 32
"""What a turn or word costs besides its own characters, in characters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallContext:
    """What a surface knows about a call besides its content.

    Attributes:
        surface: ``http`` or ``grpc``.
        deadline: seconds since the epoch.
        avoid_replicas: target replicas not to use, if others can be had.
    """

    surface: str
    tenant: Tenant
    deadline: float
    traceparent: str | None = None
    avoid_replicas: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A validated call: one engine request per choice.

    Attributes:
        completion_id: names the answer.
        requests: prompts times n, in the order of the answer's choice indices.
    """

    completion_id: str
    context: CallContext
    requests: tuple[GenerationRequest, ...]
    num_choices_per_prompt: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each prompt."""
        return [
            len(request.prompt_token_ids)
            for request in self.requests[:: self.num_choices_per_prompt]
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """New text of one choice; the last one has a finish reason.

    Attributes:
        index: the choice's index in the answer.
        logprobs: of the tokens whose text begins to show, if asked for; see ``ChoiceText``.
        prompt_logprobs: on the choice's first delta with tokens, if asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    replica_id: str
    logprobs: tuple[PlacedLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


class Generation:
    """Turns prompts into plans and plans into text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        target: TargetClient,
        config: IngressConfig,
        metrics: IngressMetrics,
        *,
        max_model_len: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._target = target
        self._config = config
        self._metrics = metrics
        self._max_model_len = max_model_len
        self._threads = ThreadPoolExecutor(config.tokenizer_threads, "tokenizer")
        self._traffic_log = TrafficLog(config.traffic_log, metrics.logged)

    async def encode_chat(self, turns: Sequence[ChatTurn], context: CallContext) -> tuple[int, ...]:
        """Token ids of a conversation, ready for the assistant's answer.

        What a tenant that consented says is kept for the training of drafts.

        Raises:
            RequestInvalidError: too long, or refused by the model's template.
        """
        num_chars = sum(len(turn.content) for turn in turns)
        self._check_chars(num_chars, "messages")
        ids = await self._tokenised(
            self._tokenizer.encode_chat, turns, num_parts=len(turns), num_chars=num_chars
        )
        self._traffic_log.record(context.tenant.name, turns)
        return tuple(ids)

    async def encode_text(self, text: str, param: str) -> tuple[int, ...]:
        """Token ids of plain text.

        Raises:
            RequestInvalidError: empty or too long.
        """
        self._check_chars(len(text), param)
        token_ids = await self._tokenised(
            self._tokenizer.encode, text, num_parts=1, num_chars=len(text)
        )
        if not token_ids:
            raise RequestInvalidError(f"'{param}' must not be empty.", param=param)
        return tuple(token_ids)

    async def constraints(
        self, fields: SamplingFields, structure: StructuredOutput | None
    ) -> Constraints:
        """What the call's texts must and must not be; bad words become tokens."""
        if not fields.bad_words:
            return Constraints(structure)
        words = fields.bad_words
        sequences = await self._tokenised(
            self._tokenizer.encode_words,
            words,
            num_parts=len(words),
            num_chars=sum(map(len, words)),
        )
        return Constraints(structure, sequences)

    def check_token_ids(self, token_ids: Sequence[int], param: str) -> tuple[int, ...]:
        """Token ids given by the client.

        Raises:
            RequestInvalidError: none, or unknown ones.
        """
        if not token_ids:
            raise RequestInvalidError(f"'{param}' must not be empty.", param=param)
        check_prompt_token_ids(token_ids, self._tokenizer.vocab_size, param)
        return tuple(token_ids)

    def plan(
        self,
        prompts: Sequence[tuple[int, ...]],
        fields: SamplingFields,
        context: CallContext,
        *,
        constraints: Constraints = UNCONSTRAINED,
        n: int,
        max_tokens: int | None,
        max_tokens_param: str,
        prompt_param: str,
        speculation: bool,
        tpot_target_s: float | None,
    ) -> Plan:
        """Build the engine requests of a call.

        Raises:
            RequestInvalidError: a prompt does not fit, or the parameters contradict each other.
        """
        if len(prompts) * n > self._config.max_choices:
            raise RequestInvalidError(
                f"At most {self._config.max_choices} choices per request (prompts times n).",
                param="n",
            )
        completion_id = uuid.uuid4().hex
        requests: list[GenerationRequest] = []
        for prompt in prompts:
            room = self._max_model_len - len(prompt)
            if room < (max_tokens != 0):
                raise ContextLengthError(
                    f"This model's maximum context length is {self._max_model_len} tokens. "
                    f"However, your prompt has {len(prompt)} tokens and leaves no room for output.",
                    param=prompt_param,
                )
            sampling = build_sampling_params(
                fields,
                max_tokens=max_tokens,
                max_tokens_param=max_tokens_param,
                room=room,
                vocab_size=self._tokenizer.vocab_size,
                constraints=constraints,
            )
            requests.extend(
                GenerationRequest(
                    request_id=f"{completion_id}-{len(requests) + choice}",
                    prompt_token_ids=prompt,
                    sampling=sampling,
                    choice_index=choice,
                    tenant=context.tenant.name,
                    tenant_key=context.tenant.tenant_key,
                    priority=context.tenant.priority,
                    deadline=context.deadline,
                    traceparent=context.traceparent,
                    speculation=speculation,
                    tpot_target_s=tpot_target_s or self._config.default_tpot_target_s,
                    avoid_replicas=context.avoid_replicas,
                )
                for choice in range(n)
            )
        return Plan(
            completion_id=completion_id,
            context=context,
            requests=tuple(requests),
            num_choices_per_prompt=n,
        )

    async def stream(
        self, plan: Plan, totals: RequestTotals
    ) -> AsyncGenerator[list[TextDelta], None]:
        """Text of all choices, interleaved as it is generated; deltas of one item came together.

        Closing the generator cancels every choice at its replica.

        Args:
            plan: from ``plan``.
            totals: filled in on the way; complete once the stream has ended.

        Raises:
            EngineError: from the engine.
            SurfaceError: no replica could serve the request.
        """
        observer = self._metrics.observe(plan.context.surface, plan.context.tenant.name)
        streams = [self._choice(plan, index, totals) for index in range(len(plan.requests))]
        try:
            async with aclosing(merge(streams)) as arrivals:
                async for deltas in arrivals:
                    for delta in deltas:
                        observer.tokens(delta.index, len(delta.token_ids))
                    yield deltas
            observer.finished(totals.usage())
        except Exception:
            observer.failed()
            raise
        finally:
            observer.close()

    async def _choice(
        self, plan: Plan, index: int, totals: RequestTotals
    ) -> AsyncGenerator[list[TextDelta], None]:
        request = plan.requests[index]
        prompt_index = index // plan.num_choices_per_prompt
        text = ChoiceText(self._tokenizer.decode, request.sampling.stop_strings)

        def shown(delta: TokenDelta) -> TextDelta:
            totals.add_output(len(delta.token_ids))
            totals.replica_id = totals.replica_id or delta.replica_id
            if delta.finish_reason is not None:
                totals.add_finished(prompt_index, delta.usage, delta.speculation)
            visible = text.push(delta)
            return TextDelta(
                index=index,
                text=visible.text,
                token_ids=delta.token_ids,
                finish_reason=delta.finish_reason,
                replica_id=delta.replica_id,
                logprobs=visible.logprobs,
                prompt_logprobs=delta.prompt_logprobs,
            )

        async with aclosing(self._target.stream(request)) as arrivals:
            async for deltas in arrivals:
                yield list(map(shown, deltas))

    def close(self) -> None:
        """Stop the tokeniser's threads, and write down the last prompts to be kept."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._traffic_log.close()

    async def _tokenised(
        self, encode: Callable[[Given], Found], given: Given, *, num_parts: int, num_chars: int
    ) -> Found:
        """What the tokenizer makes of texts: on a thread, or here if that is sooner done."""
        if num_chars + _PART_CHARS * num_parts <= _INLINE_CHARS:
            return encode(given)
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode, given)

    def _check_chars(self, num_chars: int, param: str) -> None:
        if num_chars > self._config.max_prompt_chars:
            raise RequestTooLargeError(
                f"'{param}' has {num_chars} characters; at most "
                f"{self._config.max_prompt_chars} are accepted.",
                param=param,
            )
