"""Decides what the next step computes: who runs, how many tokens of each, and who must wait.

There are no prefill and decode modes, only sequences with uncomputed tokens. A sequence with one
such token decodes (and may verify a draft behind it); one with more is cut into chunks. Running
sequences are served in the order (priority, arrival): first all that decode, then all that prefill,
then newcomers, until the step's token budget is spent.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.torch_engine.sequence import SequenceStatus
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from deployments.engine.torch_engine.page_pool import PagePool
    from deployments.engine.torch_engine.sequence import Sequence


class Chunk(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        num_new_tokens: committed tokens to compute.
        max_draft_tokens: draft nodes that may be verified behind them; their slots are allocated.
    """

    sequence: Sequence
    num_new_tokens: int
    max_draft_tokens: int

    @property
    def is_sampled(self) -> bool:
        """Whether the chunk reaches the last committed token, so that a new token follows."""
        return self.num_new_tokens == self.sequence.num_uncomputed_tokens


class Scheduler:
    """Owns the waiting queue and the running sequences."""

    def __init__(
        self,
        pool: PagePool,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_waiting: int,
        num_draft_tokens: int,
    ) -> None:
        """Create an empty scheduler.

        Args:
            pool: where pages come from.
            max_num_seqs: running sequences, at most; not above ``max_batch_tokens``, so that every
                running sequence can advance in every step.
            max_batch_tokens: rows of one step, draft nodes included.
            max_waiting: sequences that may wait once all running places are taken.
            num_draft_tokens: draft nodes per sequence and step, at most; 0 is plain decoding.
        """
        self._pool = pool
        self._max_num_seqs = min(max_num_seqs, max_batch_tokens)
        self._max_batch_tokens = max_batch_tokens
        self._max_waiting = max_waiting
        self.num_draft_tokens = num_draft_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    @property
    def is_full(self) -> bool:
        """Whether one more request would be one too many."""
        num_open = len(self.waiting) + len(self.running)
        return num_open >= self._max_waiting + self._max_num_seqs

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of the same priority that came before it."""
        insort(self.waiting, sequence, key=lambda waiting: waiting.order)

    def next_in_line(self) -> list[Sequence]:
        """The waiting sequences that could be admitted soonest."""
        return self.waiting[: self._max_num_seqs]

    def finish(self, sequence: Sequence) -> None:
        """Drop a sequence, whatever its state, and free its pages."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        self._pool.release(sequence.leave_pages(SequenceStatus.FINISHED))

    def schedule(self) -> list[Chunk]:
        """Plan one step and allocate its pages.

        Every slot of the planned tokens, and of the draft nodes allowed, is owned afterwards.
        """
        decoding = self._secure_decodes()
        budget = self._max_batch_tokens - len(decoding)
        chunks = self._allow_drafts(decoding, budget)
        budget -= sum(chunk.max_draft_tokens for chunk in chunks)
        for sequence in self.running:
            if budget and sequence.num_uncomputed_tokens > 1:
                chunks.append(_prefill_chunk(sequence, budget))
                budget -= chunks[-1].num_new_tokens
        while budget and (newcomer := self._admit()) is not None:
            chunks.append(_prefill_chunk(newcomer, budget))
            budget -= chunks[-1].num_new_tokens
        return chunks

    def _secure_decodes(self) -> list[Sequence]:
        """Give every decoding sequence a slot for its next row, preempting where it must be.

        Victims come after the sequence that needs the page, so none was secured before.
        """
        decoding = []
        for sequence in list(self.running):
            if sequence.status is not SequenceStatus.RUNNING or sequence.num_uncomputed_tokens > 1:
                continue
            if self._grow(sequence, sequence.num_computed_tokens + 1):
                decoding.append(sequence)
        return decoding

    def _grow(self, sequence: Sequence, num_rows: int) -> bool:
        """Own pages for ``num_rows`` rows; False if the sequence itself had to make room."""
        while sequence.num_slots < num_rows:
            page = self._pool.allocate()
            if page is not None:
                sequence.page_table.append(page)
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to wait; it will compute its rows again."""
        self.running.remove(sequence)
        self._pool.release(sequence.leave_pages(SequenceStatus.WAITING))
        self.add(sequence)
        self.num_preemptions += 1

    def _allow_drafts(self, decoding: list[Sequence], budget: int) -> list[Chunk]:
        is_prefill_pending = len(decoding) < len(self.running) or bool(self.waiting)
        budget = budget // 2 if is_prefill_pending else budget
        chunks = []
        for sequence in decoding:
            num_nodes = min(self._draft_room(sequence), budget)
            budget -= num_nodes
            chunks.append(Chunk(sequence, 1, num_nodes))
        return chunks

    def _draft_room(self, sequence: Sequence) -> int:
        """Draft nodes with a slot each; guesses take unowned pages but never preempt."""
        if not sequence.is_speculated:
            return 0
        # A draft as long as the rest of the output would leave no room for the bonus token.
        wanted = min(self.num_draft_tokens, sequence.num_remaining_tokens - 1)
        num_rows = len(sequence.token_ids) + wanted
        while sequence.num_slots < num_rows and (page := self._pool.allocate()) is not None:
            sequence.page_table.append(page)
        return min(wanted, sequence.num_slots - len(sequence.token_ids))

    def _admit(self) -> Sequence | None:
        """Start the first waiting sequence that is not loading, if its pages are to be had."""
        if len(self.running) >= self._max_num_seqs:
            return None
        sequence = next((waiting for waiting in self.waiting if not waiting.is_loading), None)
        if sequence is None:
            return None
        cached_pages = self._pool.acquire_prefix(sequence.reusable_keys)
        num_pages = -(-len(sequence.token_ids) // PAGE_TOKENS) - len(cached_pages)
        if num_pages > self._pool.num_free:
            self._pool.release(cached_pages)
            return None
        new_pages = [page for _ in range(num_pages) if (page := self._pool.allocate()) is not None]
        self.waiting.remove(sequence)
        sequence.begin(cached_pages, new_pages)
        insort(self.running, sequence, key=lambda running: running.order)
        return sequence


def _prefill_chunk(sequence: Sequence, budget: int) -> Chunk:
    return Chunk(sequence, min(sequence.num_uncomputed_tokens, budget), 0)
