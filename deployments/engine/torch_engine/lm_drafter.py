"""The draft pool's reference drafter: a causal language model that answers for all outcomes.

A query tells which draft the target is verifying. The model reads the new committed text and that
draft in one forward, which gives it a distribution behind every node. The likeliest outcomes (the
node at which the draft ends, and the bonus token there) are each continued for k tokens, as far as
these may well be reached and there is time. Every choice adds the noise the target will add, so
that the two agree wherever their distributions nearly do.

Rows of committed text stay in the session's pages. Rows of guesses go to scratch slots, where the
branches of a session form one tree: each row sees the text, its node's path, and itself.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from deployments.engine.errors import InvalidLogitsError
from deployments.engine.speculation.drafters.base import Drafter
from deployments.engine.speculation.types import OutcomeRow
from deployments.engine.torch_engine.connected import DraftHead
from deployments.engine.torch_engine.coupling import coupled_choices, coupled_scores
from deployments.engine.torch_engine.draft_sessions import SessionCaches
from deployments.engine.torch_engine.forward_batch import ForwardBatch, SequenceSpan
from deployments.engine.torch_engine.kv_cache import KVCache
from deployments.engine.torch_engine.model_runner import ModelRunner
from deployments.engine.torch_engine.outcome_branches import (
    Branch,
    Part,
    Round,
    ancestors_of,
    branch_part,
    depths_of,
    rows_needed,
    shed,
)
from deployments.engine.torch_engine.weights.loader import return_freed_memory
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from deployments.engine.speculation.types import DraftQuery
    from deployments.engine.torch_engine.weights.loader import LoadedModel

_UNKNOWN_LOG_CHANCE = -3.0
"""Of a token in flight that this model cannot say: another drafter, or the text itself, can."""
_EXTENSION_WEIGHT = 0.2


class CausalLMDrafter(Drafter):
    """Guesses with a language model of the target's vocabulary."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_pages: int = 256,
        max_sessions: int = 64,
        num_scratch_pages: int = 16,
        prefill_chunk_tokens: int = 512,
        least_chance: float = 0.03,
    ) -> None:
        """Allocate the pool.

        Args:
            loaded: the draft model.
            num_pages: pages of 64 tokens for committed text, of all sessions together.
            max_sessions: session caches kept; the least recently used are forgotten and read
                again if they come back.
            num_scratch_pages: pages for guesses. A query that needs more gets fewer bonus tokens,
                then shorter drafts.
            prefill_chunk_tokens: tokens of one forward while a long text is read.
            least_chance: a token less likely to be reached is not worth the row that would find it.
        """
        cache = KVCache(
            loaded.config,
            num_pages + num_scratch_pages,
            dtype=loaded.model.dtype,
            device=loaded.model.device,
        )
        self._runner = ModelRunner(loaded.model, loaded.config, cache)
        self._token_ids: Tensor | None = None
        self._columns: dict[int, int] | None = None
        if isinstance(head := loaded.model.lm_head, DraftHead):
            head.is_spread = False
            self._token_ids = head.get_buffer("token_ids")
            self._columns = {token: i for i, token in enumerate(self._token_ids.tolist())}
        self._caches = SessionCaches(num_pages, max_sessions)
        self._first_scratch = num_pages * PAGE_TOKENS
        self._num_scratch = num_scratch_pages * PAGE_TOKENS
        self._chunk = prefill_chunk_tokens
        self._least_log_chance = math.log(least_chance) if least_chance else -math.inf
        self._extension_s = 0.0

    def warm_up(self) -> None:
        """Compile before the first query, and keep no dense copy of what compiled code computes."""
        self._runner.warm_up()
        if self._runner.is_compiled:
            self._runner.model.drop_dense()
        return_freed_memory()

    def close(self, session_id: int) -> None:
        """Forget the session's cache."""
        self._caches.drop(session_id)

    def propose(self, queries: Sequence[DraftQuery]) -> list[list[OutcomeRow]]:
        """Answer the queries, as many together as fit into the pool.

        Raises:
            InvalidLogitsError: the model gave NaN.
        """
        answers: list[list[OutcomeRow]] = [[] for _ in queries]
        group: list[Round] = []
        for index, query in enumerate(queries):
            admitted = self._admit(index, query, group)
            if admitted is None and group:
                self._answer(group, answers)
                group = []
                admitted = self._admit(index, query, group)
            if admitted is not None:
                group.append(admitted)
        if group:
            self._answer(group, answers)
        return answers

    def _answer(self, group: Sequence[Round], answers: list[list[OutcomeRow]]) -> None:
        self._read_long_texts(group)
        logits = self._read_drafts_in_flight(group)
        self._choose_bonus_tokens(group, logits)
        self._continue_branches(group)
        for work in group:
            answers[work.index] = [
                OutcomeRow(
                    branch.node,
                    branch.token_ids[0],
                    tuple(branch.token_ids[1:]),
                    tuple(map(_chance, branch.log_chances)),
                )
                for branch in work.branches
            ]

    def _admit(self, index: int, query: DraftQuery, group: Sequence[Round]) -> Round | None:
        """Find pages and scratch slots for a query beside those of its group."""
        first = self._first_scratch + sum(len(work.scratch) for work in group)
        room = self._first_scratch + self._num_scratch - first
        alone = not group
        shape = shed(query, room if alone else None)
        if shape is None or not self._can_read(query):
            return None
        fanout, num_draft_tokens = shape
        num_scratch = rows_needed(len(query.in_flight), fanout, num_draft_tokens)
        if num_scratch > room:
            return None
        in_use = {work.query.session_id for work in group}
        cache = self._caches.take(query.session_id, query.token_ids, in_use)
        if cache is None:
            return None
        return Round(
            index=index,
            query=query,
            cache=cache,
            fanout=fanout,
            num_draft_tokens=num_draft_tokens,
            depths=depths_of(query.in_flight),
            ancestors=ancestors_of(query.in_flight),
            scratch=torch.arange(first, first + num_scratch),
        )

    def _can_read(self, query: DraftQuery) -> bool:
        """Whether the text fits into the pool and all tokens are in the vocabulary."""
        text = query.token_ids
        if not text or not self._caches.fits(len(text)):
            return False
        return max(*text, *query.in_flight.token_ids, 0) < self._runner.config.vocab_size

    def _read_long_texts(self, group: Sequence[Round]) -> None:
        """Prefill, chunk by chunk, until every text has at most one chunk left."""
        for work in group:
            text, cached = work.query.token_ids, work.cache.token_ids
            while len(text) - len(cached) > self._chunk:
                start, end = len(cached), len(cached) + self._chunk
                self._forward(
                    [Part(text[start:end], list(range(start, end)), work.cache.slots[:end])]
                )
                cached.extend(text[start:end])

    def _read_drafts_in_flight(self, group: Sequence[Round]) -> list[Tensor]:
        """One forward over what is left of each text and its draft.

        Returns:
            Per query [n + 1, V] logits: behind the text, then behind each node.
        """
        parts = []
        for work in group:
            text, tree, start = (
                work.query.token_ids,
                work.query.in_flight,
                len(work.cache.token_ids),
            )
            num_new, num_nodes = len(text) - start, len(tree)
            mask = None
            if num_nodes:
                mask = torch.ones(num_new + num_nodes, num_new + num_nodes, dtype=torch.bool).tril()
                mask[num_new:, num_new:] = work.ancestors[1:]
            parts.append(
                Part(
                    [*text[start:], *tree.token_ids],
                    [*range(start, len(text)), *(len(text) + d - 1 for d in work.depths[1:])],
                    torch.cat((work.cache.slots[: len(text)], work.scratch[:num_nodes])),
                    mask,
                    num_logits=num_nodes + 1,
                )
            )
        logits = self._forward(parts)
        for work in group:
            work.cache.token_ids.extend(work.query.token_ids[len(work.cache.token_ids) :])
        return list(torch.split(logits, [part.num_logits for part in parts]))

    def _choose_bonus_tokens(self, group: Sequence[Round], logits: Sequence[Tensor]) -> None:
        """Open branches for the likeliest outcomes that the draft does not hold, F for every node.

        An outcome is a place where the draft ends and the token that stands there instead. Places
        that are likelier to be the end, by the model's own scores, get more of them.
        """
        for work, logits_RV in zip(group, logits, strict=True):
            tree, length = work.query.in_flight, len(work.query.token_ids)
            positions = [length + depth for depth in work.depths]
            samplings = [work.query.sampling] * len(positions)
            scores = coupled_scores(logits_RV, samplings, positions, self._token_ids)
            log_probs_RV = scores.log_softmax(dim=1)
            reached = [0.0]
            for parent, token in zip(tree.parents, tree.token_ids, strict=True):
                column = self._column(token)
                chance = _UNKNOWN_LOG_CHANCE
                if column is not None:
                    chance = float(log_probs_RV[parent + 1, column])
                    log_probs_RV[parent + 1, column] = -torch.inf
                reached.append(reached[parent + 1] + chance)
            outcomes = (log_probs_RV + log_probs_RV.new_tensor(reached).unsqueeze(1)).flatten()
            count = min(work.fanout * len(reached), outcomes.shape[0])
            best, num_columns = outcomes.topk(count), log_probs_RV.shape[1]
            for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                if value == -torch.inf:
                    break
                row, column = divmod(place, num_columns)
                token = column if self._token_ids is None else int(self._token_ids[column])
                chance = value - reached[row]
                work.branches.append(Branch(row - 1, positions[row], value, [chance], [token]))

    def _column(self, token_id: int) -> int | None:
        """Where a token's score is; None if it is outside the draft vocabulary."""
        return token_id if self._columns is None else self._columns.get(token_id)

    def _continue_branches(self, group: Sequence[Round]) -> None:
        """Extend the branches, all queries together, one token per forward, while there is time.

        One token is worth something even late. A session that is late anyway hurries no other one.
        """
        began_at = time.monotonic()
        deadlines = [work.query.answer_by for work in group]
        for step in range(max(work.num_draft_tokens for work in group)):
            behind = began_at + self._extension_s
            would_be_late = any(began_at <= deadline < behind for deadline in deadlines)
            if step and (would_be_late or max(deadlines) < began_at):
                return
            chosen = [
                (work, indices)
                for work in group
                if (indices := work.branches_to_extend(step, self._least_log_chance))
            ]
            if not chosen:
                return
            logits = self._forward([branch_part(work, indices) for work, indices in chosen])
            branches = [(work, work.branches[i]) for work, indices in chosen for i in indices]
            samplings = [work.query.sampling for work, _ in branches]
            positions = [branch.position + step + 1 for _, branch in branches]
            choices = coupled_choices(logits, samplings, positions, self._token_ids)
            for (_, branch), choice in zip(branches, choices, strict=True):
                branch.extend(*choice)
            now = time.monotonic()
            self._extension_s += _EXTENSION_WEIGHT * (now - began_at - self._extension_s)
            began_at = now

    def _forward(self, parts: Sequence[Part]) -> Tensor:
        """Run the parts as one batch; the last ``num_logits`` rows of each are scored."""
        spans: list[SequenceSpan] = []
        rows: list[int] = []
        start = 0
        for part in parts:
            length = len(part.token_ids)
            spans.append(
                SequenceSpan(
                    start=start, length=length, kv_slots=part.kv_slots, tail_mask=part.tail_mask
                )
            )
            rows += range(start + length - part.num_logits, start + length)
            start += length
        return self._runner.forward(
            ForwardBatch(
                token_ids=torch.tensor([t for part in parts for t in part.token_ids]),
                positions=torch.tensor([p for part in parts for p in part.positions]),
                slots=torch.cat([part.kv_slots[-len(part.token_ids) :] for part in parts]),
                spans=tuple(spans),
                logit_rows=torch.tensor(rows, dtype=torch.int64),
            )
        )


def _chance(log_chance: float) -> float:
    # NaN is not less than anything, so it would pass for certainty.
    if math.isnan(log_chance):
        raise InvalidLogitsError("The draft model gave logits that are not numbers.")
    return min(1.0, math.exp(log_chance))
