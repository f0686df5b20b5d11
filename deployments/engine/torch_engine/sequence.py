"""Everything the engine knows about one request while it is being served."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

import torch

from deployments.engine.types import GenerationUsage
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from torch import Tensor

    from deployments.engine.stopping import StopCondition
    from deployments.engine.torch_engine.capture import Capture
    from deployments.engine.torch_engine.penalties import PenaltyState
    from deployments.engine.torch_engine.spec_counters import SpeculationCounters
    from deployments.engine.torch_engine.structure.constraint import Constraint
    from deployments.engine.types import (
        GenerationRequest,
        HiddenStates,
        SamplingParams,
        TokenLogprob,
    )
    from kv_store.keys import Namespace, PageKey


class SequenceStatus(Enum):
    """Where a sequence stands. It ends from any of these."""

    WAITING = auto()
    """Holds no pages."""
    RUNNING = auto()
    """Holds pages for all its tokens."""
    FINISHED = auto()
    """Holds nothing; its terminal event is out."""


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """One request's state. Owned by the engine thread.

    Attributes:
        session_id: unique within the engine's life; also the order of arrival.
        admission: counts first admissions; None before it.
        num_lost_tokens: rows that the last preemption threw away.
        token_ids: committed tokens: prompt, resumed output, new output.
        structure: what the output's form allows; ``stop`` advances it.
        num_computed_tokens: of these, the leading ones whose KV rows are in the pool.
        page_table: pages holding token i's row at entry i // PAGE_TOKENS.
        page_keys: keys of the full pages of ``token_ids``, as far as they were asked for.
        num_published_pages: leading pages that are in the prefix cache or have a twin there.
        num_tier_pages: leading pages that the tier has or that are queued for it; None where only
            pages that are new to the prefix cache are queued.
        is_tier_asked: the KV tier has been asked for this sequence's pages, or there is none.
        is_loading: the tier's answer is under way.
        num_loaded_pages: leading pages whose bytes came from the tier or lie before one that did.
        first_loaded_page: the first of them that came from the tier.
        is_session_open: the speculator knows this sequence.
        is_counted: the engine's counters include its prompt.
        num_cached_tokens: prompt tokens found computed at the first admission; None before it.
        num_tier_cached_tokens: those of them that came from the tier.
        prompt_logprobs: of the leading prompt tokens, as far as they are computed; None if they
            were not asked for or are delivered.
        capture: the hidden states that are wanted, if any are.
    """

    session_id: int
    request: GenerationRequest
    namespace: Namespace
    stop: StopCondition
    speculation: SpeculationCounters
    penalties: PenaltyState | None
    is_speculated: bool
    token_ids: list[int]
    structure: Constraint | None = None
    status: SequenceStatus = SequenceStatus.WAITING
    admission: int | None = None
    num_lost_tokens: int = 0
    num_computed_tokens: int = 0
    page_table: list[int] = field(default_factory=list)
    page_keys: list[PageKey] = field(default_factory=list)
    num_published_pages: int = 0
    num_tier_pages: int | None = None
    is_tier_asked: bool = False
    is_loading: bool = False
    first_loaded_page: int = 0
    num_loaded_pages: int = 0
    is_session_open: bool = False
    is_counted: bool = False
    num_cached_tokens: int | None = None
    num_tier_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    capture: Capture | None = None
    _slots: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @property
    def tenant(self) -> str:
        """Whose request it is."""
        return self.request.tenant

    @property
    def priority(self) -> int:
        """Lower is more urgent."""
        return self.request.priority

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the more urgent, then the one admitted first; newcomers come last."""
        return (self.request.priority, sys.maxsize if self.admission is None else self.admission)

    @property
    def sampling(self) -> SamplingParams:
        """The request's sampling settings."""
        return self.request.sampling

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt proper, without resumed output."""
        return len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output tokens so far, resumed ones included."""
        return len(self.token_ids) - self.num_prompt_tokens

    def output_tail(self, num_tokens: int) -> list[int]:
        """The last output tokens, at most so many."""
        return self.token_ids[max(self.num_prompt_tokens, len(self.token_ids) - num_tokens) :]

    @property
    def has_output(self) -> bool:
        """Whether tokens follow the prompt; else it is computed for its hidden states alone."""
        return self.stop.max_output_tokens > 0

    def take_hidden_states(self) -> HiddenStates | None:
        """Those to deliver with the next delta."""
        return self.capture.take() if self.capture is not None else None

    @property
    def num_remaining_tokens(self) -> int:
        """Output tokens still allowed."""
        return self.stop.max_output_tokens - self.num_output_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Committed tokens without KV rows: 1 while decoding, more during prefill."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_slots(self) -> int:
        """Rows that fit into the pages held."""
        return len(self.page_table) * PAGE_TOKENS

    @property
    def may_grow(self) -> bool:
        """Whether the longest output allowed needs more pages; its last token needs no row."""
        return self.num_slots < self.num_prompt_tokens + self.stop.max_output_tokens - 1

    def slots(self, start: int, end: int) -> Tensor:
        """The pool slots of rows ``start`` to ``end`` of this sequence, [end - start] int64."""
        if self._slots.numel() != self.num_slots:
            pages = torch.tensor(self.page_table, dtype=torch.int64).unsqueeze(1)
            self._slots = (pages * PAGE_TOKENS + torch.arange(PAGE_TOKENS)).flatten()
        return self._slots[start:end]

    def extend_page_keys(self) -> None:
        """Name every full page of the committed tokens."""
        for index in range(len(self.page_keys), len(self.token_ids) // PAGE_TOKENS):
            parent = self.page_keys[-1] if self.page_keys else None
            start = index * PAGE_TOKENS
            page_tokens = self.token_ids[start : start + PAGE_TOKENS]
            self.page_keys.append(self.namespace.extend(parent, page_tokens))

    @property
    def reusable_keys(self) -> list[PageKey]:
        """Keys of the pages that may come from a cache.

        The last token is always computed anew, or there would be no logits to go on from. So are
        the rows before prompt tokens whose log probabilities are still wanted, and rows whose
        hidden states are.
        """
        self.extend_page_keys()
        num_reusable = len(self.token_ids) - 1
        if self.prompt_logprobs is not None:
            num_reusable = min(num_reusable, len(self.prompt_logprobs) - 1)
        if self.capture is not None:
            num_reusable = min(num_reusable, self.capture.next_row)
        return self.page_keys[: num_reusable // PAGE_TOKENS]

    def unscored_positions(self, start: int, end: int) -> range:
        """Prompt positions whose log probabilities are wanted and follow from rows of this span.

        Args:
            start: first row; row i scores token i + 1.
            end: behind the last row.
        """
        if self.prompt_logprobs is None:
            return range(0)
        first = max(start + 1, len(self.prompt_logprobs))
        return range(first, min(end + 1, self.num_prompt_tokens))

    def take_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """The prompt's log probabilities for delivery; None ever after.

        A request that ends before its prompt is computed gets none rather than a part.
        """
        taken, self.prompt_logprobs = self.prompt_logprobs, None
        if taken is None or len(taken) < self.num_prompt_tokens:
            return None
        return tuple(taken)

    def begin(self, cached_pages: SequenceOf[int], new_pages: SequenceOf[int]) -> None:
        """Start running on pages that hold the leading tokens already, and empty ones."""
        self.page_table = [*cached_pages, *new_pages]
        self.num_published_pages = len(cached_pages)
        self.num_computed_tokens = len(cached_pages) * PAGE_TOKENS
        self.status = SequenceStatus.RUNNING
        if self.num_cached_tokens is None:
            self._count_cached(len(cached_pages))

    def _count_cached(self, num_cached_pages: int) -> None:
        num_cached = min(num_cached_pages * PAGE_TOKENS, self.num_prompt_tokens)
        end = min(self.num_loaded_pages * PAGE_TOKENS, num_cached)
        start = min(self.first_loaded_page * PAGE_TOKENS, end)
        self.num_cached_tokens = num_cached
        self.num_tier_cached_tokens = end - start

    def leave_pages(self, status: SequenceStatus) -> list[int]:
        """Stop running; the caller releases the pages returned."""
        pages, self.page_table = self.page_table, []
        self._slots = self._slots[:0]
        self.num_computed_tokens = 0
        self.num_published_pages = 0
        self.status = status
        return pages

    def commit(self, token_ids: SequenceOf[int], num_computed_tokens: int) -> None:
        """Append output whose place in the text is final.

        Args:
            token_ids: the new tokens.
            num_computed_tokens: leading tokens whose KV rows are now in place.
        """
        self.token_ids.extend(token_ids)
        self.num_computed_tokens = num_computed_tokens
        if self.penalties is not None:
            self.penalties.add_output(token_ids)

    def usage(self) -> GenerationUsage:
        """Token counts so far."""
        return GenerationUsage(
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_cached_tokens=self.num_cached_tokens or 0,
            num_tier_cached_tokens=self.num_tier_cached_tokens,
        )
