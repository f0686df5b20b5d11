"""Decides what the next step computes: who runs, how many tokens of each, and who must wait.

There are no prefill and decode modes, only sequences with uncomputed tokens. A sequence with one
such token decodes (and may verify a draft behind it); one with more is cut into chunks. Every
running sequence that decodes gets its token in every step; what is left of the step's token budget
goes to prefills and newcomers.

A newcomer is admitted only if there are pages for all its tokens and one more for each running
sequence that may still grow. When pages run out all the same, the last one admitted makes room: it
has lost the least, and it comes back only when others have ended, so the engine does not thrash.
"""

from __future__ import annotations

import math
from bisect import bisect, insort
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.torch_engine.chunking import share_budget
from deployments.engine.torch_engine.fair_queue import (
    OUTPUT_TOKEN_COST,
    PROMPT_TOKEN_COST,
    FairQueue,
)
from deployments.engine.torch_engine.sequence import SequenceStatus
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        is_last = self.num_new_tokens == self.sequence.num_uncomputed_tokens
        return is_last and self.sequence.has_output


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
        self.waiting: FairQueue[Sequence] = FairQueue()
        self.running: list[Sequence] = []
        self._prefilling: list[Sequence] = []
        self._num_admissions = 0
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0

    @property
    def is_full(self) -> bool:
        """Whether one more request would be one too many."""
        num_open = len(self.waiting) + len(self.running)
        return num_open >= self._max_waiting + self._max_num_seqs

    @property
    def num_backlog_tokens(self) -> int:
        """Tokens to compute before all that are here decode.

        Cached prefixes of those that wait count as well: nobody has looked for them yet.
        """
        waiting = sum(len(sequence.token_ids) for sequence in self.waiting)
        return waiting + sum(
            sequence.num_uncomputed_tokens
            for sequence in self.running
            if sequence.num_uncomputed_tokens > 1
        )

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait; one that another replica has begun goes before newcomers."""
        if sequence.request.resumed_output_ids:
            self.waiting.put_back(sequence)
        else:
            self.waiting.push(sequence)

    def next_in_line(self) -> list[Sequence]:
        """The waiting sequences that could be admitted soonest."""
        return list(islice(self._candidates(), self._max_num_seqs))

    def count_output(self, sequence: Sequence, num_tokens: int) -> None:
        """Charge a sequence's tenant for new output."""
        self.waiting.charge(sequence, OUTPUT_TOKEN_COST * num_tokens)

    def finish(self, sequence: Sequence) -> None:
        """Drop a sequence, whatever its state, and free its pages."""
        if sequence.status is SequenceStatus.RUNNING:
            self.running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        self._pool.release(sequence.leave_pages(SequenceStatus.FINISHED))

    def schedule(self) -> list[Chunk]:
        """Plan one step and allocate its pages.

        Every slot of the planned tokens, and of the draft nodes allowed, is owned afterwards.
        """
        self._yield_to_urgent()
        decoding = self._secure_decodes()
        budget = self._max_batch_tokens - len(decoding)
        chunks = self._allow_drafts(decoding, budget)
        budget -= sum(chunk.max_draft_tokens for chunk in chunks)
        return chunks + self._plan_prefills(decoding, budget)

    def _candidates(self) -> Iterator[Sequence]:
        """The waiting sequences in line, less those whose next page is just being computed.

        The choices of one request so share their prompt's pages, and so do requests with the same
        system prompt that arrive together. They hold nothing while they wait, and wait only for a
        running sequence that is not less urgent and got tokens in the latest plan: if it stops for
        whatever reason, they compute the page themselves.
        """
        return (waiting for waiting in self.waiting if not self._is_under_way(waiting))

    def _is_under_way(self, sequence: Sequence) -> bool:
        computing = [
            other
            for other in self._prefilling
            if other.status is SequenceStatus.RUNNING
            and other.priority <= sequence.priority
            and other.num_published_pages < len(other.page_keys)
        ]
        if not computing:
            return False
        keys = sequence.reusable_keys
        index = self._pool.touch_prefix(keys)
        return index < len(keys) and any(
            other.num_published_pages <= index and keys[index] in other.page_keys[index : index + 1]
            for other in computing
        )

    def _yield_to_urgent(self) -> None:
        """Preempt less urgent sequences where that gives the first in line its place."""
        urgent = next((waiting for waiting in self._candidates() if not waiting.is_loading), None)
        if urgent is None:
            return
        staying = [running for running in self.running if running.priority <= urgent.priority]
        leaving = self.running[len(staying) :]
        if not leaving or len(staying) == self._max_num_seqs:
            return
        cached_pages = self._pool.acquire_prefix(urgent.reusable_keys)
        num_pages = _num_pages(urgent) - len(cached_pages)
        kept = {page for sequence in staying for page in sequence.page_table}.union(cached_pages)
        freed = {page for sequence in leaving for page in sequence.page_table} - kept
        if num_pages + _num_reserved(staying) <= self._pool.num_free + len(freed):
            while len(self.running) > len(staying) and not self._has_room(num_pages):
                self._preempt(self.running[-1])
        self._pool.release(cached_pages)

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
        sequence.num_lost_tokens = sequence.num_computed_tokens
        self._pool.release(sequence.leave_pages(SequenceStatus.WAITING))
        self.waiting.put_back(sequence)
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

    def _plan_prefills(self, decoding: list[Sequence], budget: int) -> list[Chunk]:
        """Admit whoever would get tokens at once, and cut the prefills' chunks.

        Sequences that are too long for what is left are passed over, as others before them keep
        the step busy, but not for less urgent ones, which would have to yield to them at once; one
        that lacks pages is not, or it might lack them for ever.
        """
        secured = set(decoding)
        prefilling = [sequence for sequence in self.running if sequence not in secured]
        self._prefilling = [other for other in self._prefilling if other in prefilling]
        least_urgent = math.inf
        for candidate in self.next_in_line() if budget else ():
            if candidate.priority > least_urgent:
                break
            if candidate.is_loading or self._is_under_way(candidate):
                continue
            num_cached = self._pool.touch_prefix(candidate.reusable_keys) * PAGE_TOKENS
            place = bisect(prefilling, candidate.order, key=lambda running: running.order)
            num_uncomputed = [sequence.num_uncomputed_tokens for sequence in prefilling]
            num_uncomputed.insert(place, len(candidate.token_ids) - num_cached)
            if not share_budget(num_uncomputed, budget)[place]:
                least_urgent = candidate.priority
                continue
            if not self._admit(candidate):
                break
            prefilling.insert(place, candidate)
            self._prefilling.append(candidate)
        shares = share_budget([sequence.num_uncomputed_tokens for sequence in prefilling], budget)
        chunks = [
            Chunk(sequence, num_tokens, 0)
            for sequence, num_tokens in zip(prefilling, shares, strict=True)
            if num_tokens
        ]
        self._prefilling = [chunk.sequence for chunk in chunks]
        return chunks

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence, if there is room for it."""
        cached_pages = self._pool.acquire_prefix(sequence.reusable_keys)
        num_pages = _num_pages(sequence) - len(cached_pages)
        if not self._has_room(num_pages):
            self._pool.release(cached_pages)
            return False
        new_pages = [page for _ in range(num_pages) if (page := self._pool.allocate()) is not None]
        self.waiting.remove(sequence)
        sequence.begin(cached_pages, new_pages)
        if sequence.admission is None:
            self._num_admissions += 1
            sequence.admission = self._num_admissions
            self.waiting.charge(sequence, PROMPT_TOKEN_COST * sequence.num_uncomputed_tokens)
        self.num_recomputed_tokens += max(
            0, sequence.num_lost_tokens - sequence.num_computed_tokens
        )
        insort(self.running, sequence, key=lambda running: running.order)
        return True

    def _has_room(self, num_pages: int) -> bool:
        """Whether one more sequence may run that needs so many new pages."""
        is_page_room = num_pages + _num_reserved(self.running) <= self._pool.num_free
        return len(self.running) < self._max_num_seqs and is_page_room


def _num_pages(sequence: Sequence) -> int:
    return -(-len(sequence.token_ids) // PAGE_TOKENS)


def _num_reserved(running: list[Sequence]) -> int:
    """Pages kept for running sequences: one for each that may need another."""
    return sum(sequence.may_grow for sequence in running)
