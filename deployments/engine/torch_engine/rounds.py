"""The engine's side of speculation: drafts in, outcomes out. Nothing here waits.

Drafts are guesses from outside. A malformed one is dropped, an overlong one cut; none can change
the text, because what is accepted is only what the sampler chose by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.errors import InvalidLogitsError, RequestRejectedError
from deployments.engine.speculation.acceptance import accept
from deployments.engine.speculation.speculator import (
    DraftRequest,
    RoundResult,
    StepLoad,
    TakenDraft,
)
from deployments.engine.speculation.types import DraftSampling, DraftTree, SessionSpec
from deployments.engine.stopping import Stop
from deployments.engine.torch_engine.sampler import INVALID_TOKEN, NO_TOKEN
from deployments.engine.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from deployments.engine.errors import EngineError
    from deployments.engine.speculation.speculator import Speculator
    from deployments.engine.torch_engine.scheduler import Chunk
    from deployments.engine.torch_engine.sequence import Sequence


class Outcome(NamedTuple):
    """What one sampled chunk gave.

    Attributes:
        nodes: accepted draft nodes that became output, from the root's child downwards.
        new_token_ids: what is committed.
        stop: the end of the output, if it was reached.
        error: why nothing can follow ``new_token_ids``, if that is so and no end was reached.
        first_row: the step's logit row behind the committed text; node n's row is n + 1 further.
    """

    sequence: Sequence
    draft: TakenDraft
    nodes: tuple[int, ...]
    new_token_ids: tuple[int, ...]
    stop: Stop | None
    error: EngineError | None
    first_row: int

    @property
    def rows(self) -> list[int]:
        """The step's logit rows that the new tokens were chosen from."""
        rows = [self.first_row, *(self.first_row + 1 + node for node in self.nodes)]
        return rows[: len(self.new_token_ids)]


def verify(
    sequence: Sequence, draft: TakenDraft, choices: SequenceOf[int], first_row: int
) -> Outcome:
    """Accept what the draft foresaw, and cut where the output ends.

    Args:
        sequence: its stop condition is advanced; the rest is left as it is.
        draft: what was verified, possibly empty.
        choices: the sampler's token of every logit row of the step.
        first_row: the one behind the committed text; those behind the draft's nodes follow it.
    """
    acceptance = accept(draft.tree, choices[first_row : first_row + 1 + len(draft.tree)])
    tokens = [draft.tree.token_ids[node] for node in acceptance.nodes]
    is_chosen = acceptance.bonus_token_id not in (INVALID_TOKEN, NO_TOKEN)
    if is_chosen:
        tokens.append(acceptance.bonus_token_id)
    num_kept, stop = sequence.stop.cut(tokens)
    error = None
    if stop is None and not is_chosen:
        stop, error = _ending(sequence, acceptance.bonus_token_id)
    return Outcome(
        sequence=sequence,
        draft=draft,
        nodes=acceptance.nodes[:num_kept],
        new_token_ids=tuple(tokens[:num_kept]),
        stop=stop,
        error=error,
        first_row=first_row,
    )


def _ending(sequence: Sequence, choice: int) -> tuple[Stop | None, EngineError | None]:
    """How an output ends behind which no token could be chosen."""
    if choice == INVALID_TOKEN:
        return None, InvalidLogitsError("The model gave logits that are not numbers.")
    structure = sequence.structure
    if structure is None:
        return None, RequestRejectedError(
            "The bad words leave no token to go on with.", "bad_words"
        )
    if structure.can_end:
        return Stop(FinishReason.STOP), None
    reason = structure.failure or "no token fits, or none that is not banned"
    asked = sequence.sampling.structure
    return None, RequestRejectedError(
        f"The output cannot be completed in the form asked for: {reason}.",
        asked.param if asked is not None else None,
    )


class DraftRounds:
    """Talks to the speculator, once per step and kind of call."""

    def __init__(self, speculator: Speculator, vocab_size: int) -> None:
        self._speculator = speculator
        self._vocab_size = vocab_size

    def begin(self, chunks: SequenceOf[Chunk]) -> list[TakenDraft]:
        """Get the drafts of the coming step and announce its rounds.

        A chunk that ends a prefill takes part with an empty draft: the draft pool may use the time
        of this forward to think about the first token already.

        Returns:
            One draft per chunk, in order; each fits into the chunk's slots.
        """
        taken = [TakenDraft(tree=DraftTree()) for _ in chunks]
        asking: list[int] = []
        requests: list[DraftRequest] = []
        for index, chunk in enumerate(chunks):
            if not chunk.sequence.is_speculated:
                continue
            self._open_session(chunk.sequence)
            if chunk.is_sampled:
                asking.append(index)
                requests.append(
                    DraftRequest(
                        session_id=chunk.sequence.session_id,
                        token_ids=chunk.sequence.token_ids,
                        max_draft_tokens=chunk.max_draft_tokens,
                        tpot_target_s=chunk.sequence.request.tpot_target_s,
                    )
                )
        if not requests:
            return taken
        rounds: list[tuple[DraftRequest, DraftTree]] = []
        load = StepLoad(
            num_rows=sum(chunk.num_new_tokens for chunk in chunks) - len(requests),
            num_tokens=sum(chunk.is_sampled for chunk in chunks) - len(requests),
            tpot_targets_s=tuple(
                target_s
                for chunk in chunks
                if chunk.is_sampled
                and not chunk.sequence.is_speculated
                and (target_s := chunk.sequence.request.tpot_target_s) is not None
            ),
        )
        answers = self._speculator.take(requests, load)
        for index, request, answer in zip(asking, requests, answers, strict=True):
            tree = usable_draft(answer.tree, request.max_draft_tokens, self._vocab_size)
            structure = chunks[index].sequence.structure
            if structure is not None:
                tree = structure.draft(tree, request.max_draft_tokens)
            taken[index] = TakenDraft(
                tree=tree, table_hit=answer.table_hit, table_miss=answer.table_miss
            )
            rounds.append((request, tree))
        self._speculator.verifying(rounds)
        return taken

    def end(self, outcomes: SequenceOf[Outcome]) -> None:
        """Report the step. The sequences' texts must not have grown yet."""
        results = [
            RoundResult(
                session_id=outcome.sequence.session_id,
                tree=outcome.draft.tree,
                nodes=outcome.nodes,
                new_token_ids=outcome.new_token_ids,
            )
            for outcome in outcomes
            if outcome.sequence.is_speculated and outcome.new_token_ids
        ]
        if any(outcome.sequence.is_speculated for outcome in outcomes):
            self._speculator.verified(results)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        if sequence.is_session_open:
            self._speculator.close(sequence.session_id)

    def _open_session(self, sequence: Sequence) -> None:
        if sequence.is_session_open:
            return
        request, sampling = sequence.request, sequence.sampling
        sequence.is_session_open = True
        self._speculator.open(
            SessionSpec(
                session_id=sequence.session_id,
                request_id=request.request_id,
                tenant=request.tenant,
                token_ids=tuple(sequence.token_ids),
                sampling=DraftSampling(
                    seed=sampling.seed,
                    choice_index=request.choice_index,
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    min_p=sampling.min_p,
                ),
                traceparent=request.traceparent,
            )
        )


def usable_draft(tree: DraftTree, max_draft_tokens: int, vocab_size: int) -> DraftTree:
    """The part of a draft that can be verified.

    Returns:
        The tree, cut to ``max_draft_tokens`` nodes; empty if it is malformed.
    """
    is_sound = len(tree.parents) == len(tree.token_ids) and all(
        -1 <= parent < node and 0 <= token < vocab_size
        for node, (parent, token) in enumerate(zip(tree.parents, tree.token_ids, strict=False))
    )
    if not is_sound or max_draft_tokens <= 0:
        return DraftTree()
    return tree.cut(max_draft_tokens)
