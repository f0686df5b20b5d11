"""The engine without threads: schedule, run, commit. One call of ``step`` is one model forward."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from deployments.engine.errors import (
    DeadlineExceededError,
    EngineError,
    EngineOverloadedError,
)
from deployments.engine.stopping import Stop, StopCondition
from deployments.engine.torch_engine.batch_builder import build_step, winner_moves
from deployments.engine.torch_engine.capture import Capture, forward
from deployments.engine.torch_engine.logprobs import (
    invalid_logits,
    output_logprobs,
    score_prompts,
    wants_prompt_logprobs,
)
from deployments.engine.torch_engine.penalties import PenaltyState
from deployments.engine.torch_engine.rounds import DraftRounds, verify
from deployments.engine.torch_engine.sampler import sample
from deployments.engine.torch_engine.sequence import Sequence
from deployments.engine.torch_engine.spec_counters import SpeculationCounters
from deployments.engine.types import EngineStats, FinishReason, TokenDelta

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

    from torch import Tensor

    from deployments.engine.speculation.speculator import Speculator, TakenDraft
    from deployments.engine.torch_engine.capture import StepFeatures
    from deployments.engine.torch_engine.forward_batch import ForwardBatch
    from deployments.engine.torch_engine.head_drafter import HeadDrafter
    from deployments.engine.torch_engine.kv_transfer import KVTransfer, PageMemory
    from deployments.engine.torch_engine.model_runner import FeatureOutput
    from deployments.engine.torch_engine.page_pool import PagePool
    from deployments.engine.torch_engine.rounds import Outcome
    from deployments.engine.torch_engine.scheduler import Chunk, Scheduler
    from deployments.engine.torch_engine.structure.constraint import Constraint
    from deployments.engine.types import GenerationRequest, TokenLogprob
    from deployments.engine.validation import ModelLimits

_EWMA_WEIGHT = 0.1


class Runner(Protocol):
    """The model, as the engine sees it."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Compute the batch, write its KV rows, and return [M, V] float32 logits."""

    def forward_with_features(
        self, batch: ForwardBatch, capture_layers: tuple[int, ...]
    ) -> FeatureOutput:
        """As ``forward``, and hand out hidden states, see ``CaptureSpec``."""


class Event(NamedTuple):
    """Something to tell a request's reader; an error is terminal."""

    session_id: int
    content: TokenDelta | EngineError


class EngineCore:
    """State and step of one engine. Every method is called from one thread."""

    def __init__(
        self,
        *,
        runner: Runner,
        memory: PageMemory,
        pool: PagePool,
        scheduler: Scheduler,
        transfer: KVTransfer,
        speculator: Speculator,
        head: HeadDrafter | None,
        limits: ModelLimits,
        detokenize: Callable[[SequenceOf[int]], str],
        device: torch.device,
        wall_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runner = runner
        self._memory = memory
        self._pool = pool
        self._scheduler = scheduler
        self._transfer = transfer
        self._rounds = DraftRounds(speculator, limits.vocab_size)
        self._head = head
        self._limits = limits
        self._detokenize = detokenize
        self._device = device
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        self._open: dict[int, Sequence] = {}
        self._events: list[Event] = []
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0
        self._num_cached_tokens = 0
        self._num_tier_cached_tokens = 0
        self._step_time_ewma_s = 0.0
        self._speculation = SpeculationCounters()

    @property
    def transfer(self) -> KVTransfer:
        """Its methods for any thread are the event loop's as well."""
        return self._transfer

    def add(
        self, session_id: int, request: GenerationRequest, structure: Constraint | None = None
    ) -> None:
        """Queue a validated request; if there is no room, somebody's reader is told.

        Not always the newcomer's: see ``FairQueue.first_to_leave``.

        Args:
            session_id: never used before, and higher than that of every earlier request.
            request: has passed ``validate_request``.
            structure: made from ``request.sampling.structure``, if there is one.
        """
        sequence = self._new_sequence(session_id, request, structure)
        self._open[session_id] = sequence
        num_kept, stop = sequence.stop.cut(request.resumed_output_ids)
        if stop is not None or 0 < num_kept == sequence.stop.max_output_tokens:
            # The replica that died had just not told anybody that the output was complete.
            self._end(sequence, (), stop or Stop(FinishReason.LENGTH))
            return
        # What another replica had begun is owed its end; no more of it comes than ran there.
        if self._scheduler.is_full and not request.resumed_output_ids:
            loser = self._scheduler.waiting.first_to_leave(sequence) or sequence
            self._fail(loser, EngineOverloadedError("The engine's waiting queue is full."))
            if loser is sequence:
                return
        self._scheduler.add(sequence)

    def abort(self, session_id: int) -> None:
        """End a request with what it has; unknown ids are ignored."""
        sequence = self._open.get(session_id)
        if sequence is not None:
            self._end(sequence, (), Stop(FinishReason.ABORT))

    def step(self) -> bool:
        """Advance every request that can advance.

        Returns:
            False if there was nothing to compute.
        """
        started = self._monotonic()
        self._expire()
        self._transfer.finish_loads()
        for sequence in self._scheduler.next_in_line():
            self._transfer.begin_load(sequence)
        chunks = self._scheduler.schedule()
        if not chunks:
            return False
        self._count_admitted(chunks)
        taken = self._rounds.begin(chunks)
        self._commit(chunks, taken, *self._compute(chunks, taken))
        self._num_steps += 1
        elapsed = self._monotonic() - started
        weight = _EWMA_WEIGHT if self._num_steps > 1 else 1.0
        self._step_time_ewma_s += weight * (elapsed - self._step_time_ewma_s)
        return True

    def take_events(self) -> list[Event]:
        """What there is to tell since the last call, in order."""
        events, self._events = self._events, []
        return events

    def idle_s(self) -> float | None:
        """How long there is nothing to do unless a command or a load wakes the engine.

        Returns:
            Seconds; None for ever.
        """
        waits = [
            sequence.request.deadline - self._wall_clock()
            for sequence in self._open.values()
            if sequence.request.deadline is not None
        ]
        if self._transfer.gives_up_at is not None:
            waits.append(self._transfer.gives_up_at - self._monotonic())
        return max(0.0, min(waits)) if waits else None

    def stats(self) -> EngineStats:
        """A snapshot."""
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            num_total_pages=self._pool.num_pages,
            num_free_pages=self._pool.num_free,
            num_backlog_tokens=self._scheduler.num_backlog_tokens,
            num_preemptions=self._scheduler.num_preemptions,
            num_recomputed_tokens=self._scheduler.num_recomputed_tokens,
            num_steps=self._num_steps,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_local_cached_tokens=self._num_cached_tokens - self._num_tier_cached_tokens,
            num_tier_cached_tokens=self._num_tier_cached_tokens,
            step_time_ewma_s=self._step_time_ewma_s,
            speculation=self._speculation.snapshot(),
        )

    def check_integrity(self) -> None:
        """Check that every page is accounted for.

        Raises:
            RuntimeError: the books do not balance.
        """
        self._pool.check_integrity([sequence.page_table for sequence in self._open.values()])
        num_queued = len(self._scheduler.waiting) + len(self._scheduler.running)
        if num_queued != len(self._open):
            raise RuntimeError(f"{len(self._open)} requests are open, {num_queued} are queued")

    def _new_sequence(
        self, session_id: int, request: GenerationRequest, structure: Constraint | None
    ) -> Sequence:
        sampling = request.sampling
        penalties = None
        if PenaltyState.is_needed(sampling):
            penalties = PenaltyState(sampling, self._limits.vocab_size, self._device)
            penalties.add_prompt(request.prompt_token_ids)
            penalties.add_output(request.resumed_output_ids)
        return Sequence(
            session_id=session_id,
            request=request,
            namespace=self._transfer.namespace(request.tenant_key),
            stop=StopCondition(
                max_output_tokens=self._limits.max_output_tokens(request),
                min_tokens=sampling.min_tokens,
                stop_token_ids=self._limits.stop_token_ids(request),
                stop_strings=sampling.stop_strings,
                detokenize=self._detokenize,
                structure=structure,
            ),
            speculation=SpeculationCounters(),
            penalties=penalties,
            is_speculated=request.speculation and self._scheduler.num_draft_tokens > 0,
            token_ids=[*request.prompt_token_ids, *request.resumed_output_ids],
            prompt_logprobs=[None] if wants_prompt_logprobs(request) else None,
            structure=structure,
            capture=Capture.of(request),
            num_tier_pages=request.num_tier_pages,
        )

    def _expire(self) -> None:
        now = self._wall_clock()
        for sequence in list(self._open.values()):
            deadline = sequence.request.deadline
            if deadline is not None and now >= deadline:
                self._fail(sequence, DeadlineExceededError("The request's deadline has passed."))

    def _compute(
        self, chunks: SequenceOf[Chunk], taken: SequenceOf[TakenDraft]
    ) -> tuple[SequenceOf[int], Tensor, StepFeatures]:
        """The sampler's choice behind every row that has one, all logits, and hidden states."""
        planned = build_step(chunks, [draft.tree for draft in taken])
        logits_MV, features = forward(self._runner, chunks, planned.batch, self._head)
        choices = sample(logits_MV[: len(planned.sample_rows)], planned.sample_rows)
        score_prompts(logits_MV[len(planned.sample_rows) :], planned.prompt_rows)
        return choices, logits_MV, features

    def _commit(
        self,
        chunks: SequenceOf[Chunk],
        taken: SequenceOf[TakenDraft],
        choices: SequenceOf[int],
        logits_MV: Tensor,
        features: StepFeatures,
    ) -> None:
        """Make the step's outcome final: tokens, KV rows, cached pages, events."""
        outcomes: list[Outcome] = []
        next_row = 0
        for index, (chunk, draft) in enumerate(zip(chunks, taken, strict=True)):
            if chunk.is_sampled:
                outcome = verify(chunk.sequence, draft, choices, next_row)
                outcomes.append(outcome)
                next_row += 1 + len(draft.tree)
                features.keep(index, chunk, outcome.nodes, outcome.new_token_ids)
            else:
                features.keep(index, chunk)
                self._finish_chunk(chunk)
        features.read()
        self._move_winners(outcomes)
        # Before the texts grow: a drafter still sees the text its draft was made for.
        self._rounds.end(outcomes)
        logprobs = output_logprobs(logits_MV, outcomes)
        for outcome, its_logprobs in zip(outcomes, logprobs, strict=True):
            self._finish_step(outcome, its_logprobs)

    def _move_winners(self, outcomes: SequenceOf[Outcome]) -> None:
        """Put the KV rows of accepted branches where their tokens stand in the text."""
        moves = [
            winner_moves(outcome.sequence, len(outcome.sequence.token_ids), outcome.nodes)
            for outcome in outcomes
            if outcome.nodes and outcome.nodes[-1] != len(outcome.nodes) - 1
        ]
        if moves:
            sources = torch.cat([source for source, _ in moves])
            destinations = torch.cat([destination for _, destination in moves])
            self._memory.copy_rows(sources.to(self._device), destinations.to(self._device))

    def _finish_chunk(self, chunk: Chunk) -> None:
        """Commit rows behind which no token was chosen."""
        sequence = chunk.sequence
        if (invalid := invalid_logits(sequence.prompt_logprobs)) is not None:
            self._fail(sequence, invalid)
            return
        sequence.num_computed_tokens += chunk.num_new_tokens
        self._transfer.publish(sequence)
        if not sequence.num_uncomputed_tokens:
            self._end(sequence, (), Stop(FinishReason.LENGTH))
        elif (hidden_states := sequence.take_hidden_states()) is not None:
            delta = TokenDelta(
                request_id=sequence.request.request_id,
                token_ids=(),
                choice_index=sequence.request.choice_index,
                hidden_states=hidden_states,
            )
            self._events.append(Event(sequence.session_id, delta))

    def _finish_step(self, outcome: Outcome, logprobs: tuple[TokenLogprob, ...]) -> None:
        sequence, new_token_ids = outcome.sequence, outcome.new_token_ids
        if (invalid := invalid_logits(sequence.prompt_logprobs)) is not None:
            self._fail(sequence, invalid)
            return
        num_computed_tokens = len(sequence.token_ids) + len(outcome.nodes)
        sequence.commit(new_token_ids, num_computed_tokens)
        if outcome.error is None:
            self._transfer.publish(sequence)
        self._num_output_tokens += len(new_token_ids)
        self._scheduler.count_output(sequence, len(new_token_ids))
        sequence.speculation.add(outcome.draft, outcome.nodes)
        self._speculation.add(outcome.draft, outcome.nodes)
        if outcome.stop is not None:
            self._end(sequence, new_token_ids, outcome.stop, logprobs)
            return
        if new_token_ids:
            delta = TokenDelta(
                request_id=sequence.request.request_id,
                token_ids=new_token_ids,
                choice_index=sequence.request.choice_index,
                logprobs=logprobs,
                prompt_logprobs=sequence.take_prompt_logprobs(),
                hidden_states=sequence.take_hidden_states(),
            )
            self._events.append(Event(sequence.session_id, delta))
        if outcome.error is not None:
            self._fail(sequence, outcome.error)

    def _count_admitted(self, chunks: SequenceOf[Chunk]) -> None:
        for sequence in (chunk.sequence for chunk in chunks):
            if not sequence.is_counted:
                sequence.is_counted = True
                self._num_prompt_tokens += sequence.num_prompt_tokens
                self._num_cached_tokens += sequence.num_cached_tokens or 0
                self._num_tier_cached_tokens += sequence.num_tier_cached_tokens

    def _end(
        self,
        sequence: Sequence,
        new_token_ids: tuple[int, ...],
        stop: Stop,
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        delta = TokenDelta(
            request_id=sequence.request.request_id,
            token_ids=new_token_ids,
            choice_index=sequence.request.choice_index,
            finish_reason=stop.reason,
            stop_match=stop.match,
            usage=sequence.usage(),
            speculation=sequence.speculation.snapshot(),
            logprobs=logprobs,
            prompt_logprobs=sequence.take_prompt_logprobs(),
            hidden_states=sequence.take_hidden_states(),
        )
        self._events.append(Event(sequence.session_id, delta))
        self._leave(sequence)

    def _fail(self, sequence: Sequence, error: EngineError) -> None:
        self._events.append(Event(sequence.session_id, error))
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        del self._open[sequence.session_id]
        self._transfer.forget(sequence)
        self._scheduler.finish(sequence)
        self._rounds.leave(sequence)
        if self._head is not None:
            self._head.close(sequence.session_id)
