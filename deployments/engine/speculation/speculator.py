"""The target engine's door to all drafters. Called from the engine thread; nothing here blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from deployments.engine.speculation.types import DraftTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.speculation.types import SessionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftRequest:
    """A running sequence that could verify a draft in the coming step.

    Attributes:
        token_ids: committed tokens, prompt included.
        max_draft_tokens: no more than this fits (length limit, pages, step budget).
        tpot_target_s: seconds per output token that it is to have at most.
    """

    session_id: int
    token_ids: Sequence[int]
    max_draft_tokens: int
    tpot_target_s: float | None = None


class StepLoad(NamedTuple):
    """What a step does besides choosing one token for each request that may have a draft.

    Attributes:
        num_rows: tokens it computes.
        num_tokens: tokens it chooses.
        tpot_targets_s: of the sequences that it chooses them for, where they have one.
    """

    num_rows: int
    num_tokens: int
    tpot_targets_s: tuple[float, ...] = ()


NOTHING_ELSE = StepLoad(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenDraft:
    """What a sequence verifies in the coming step.

    Attributes:
        tree: possibly empty.
        table_hit: an outcome row of the pool fitted.
        table_miss: the pool serves this session and no row fitted.
    """

    tree: DraftTree
    table_hit: bool = False
    table_miss: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """What became of a sequence's draft.

    Attributes:
        nodes: accepted ones of the tree, from the root's child downwards.
        new_token_ids: committed in this step: the accepted ones and the bonus token.
    """

    session_id: int
    tree: DraftTree
    nodes: tuple[int, ...]
    new_token_ids: tuple[int, ...]


class Speculator(ABC):
    """Per engine step: ``take`` drafts, announce the round with ``verifying``, report ``verified``.

    The order of calls of one step is take -> verifying -> (target forward) -> verified. A session
    the scheduler skips is in none of them and keeps its table.
    """

    def add_head(self, head: Drafter) -> None:  # noqa: B027 - most have no use for one
        """Draft with this one too, which runs beside the target; called before the first session.

        Its time is the step's, so it is asked where that pays.
        """

    @abstractmethod
    def open(self, session: SessionSpec) -> None:
        """A sequence begins to be speculated (its prefill may still run)."""

    @abstractmethod
    def take(
        self, requests: Sequence[DraftRequest], load: StepLoad = NOTHING_ELSE
    ) -> list[TakenDraft]:
        """The draft to verify for each request, in order."""

    @abstractmethod
    def verifying(self, rounds: Sequence[tuple[DraftRequest, DraftTree]]) -> None:
        """The step's forward is about to start; the draft pool works while it runs."""

    @abstractmethod
    def verified(self, results: Sequence[RoundResult]) -> None:
        """The step's outcome, for statistics and for drafters that learn from output."""

    @abstractmethod
    def close(self, session_id: int) -> None:
        """The sequence ended, was aborted, or left; unknown ids are ignored."""

    @abstractmethod
    def shutdown(self) -> None:
        """Stop threads and close the links to the draft pool."""


class NoSpeculation(Speculator):
    """Plain decoding."""

    def open(self, session: SessionSpec) -> None:
        """Nothing to do."""

    def take(
        self, requests: Sequence[DraftRequest], load: StepLoad = NOTHING_ELSE
    ) -> list[TakenDraft]:
        """Empty drafts."""
        return [TakenDraft(tree=DraftTree()) for _ in requests]

    def verifying(self, rounds: Sequence[tuple[DraftRequest, DraftTree]]) -> None:
        """Nothing to do."""

    def verified(self, results: Sequence[RoundResult]) -> None:
        """Nothing to do."""

    def close(self, session_id: int) -> None:
        """Nothing to do."""

    def shutdown(self) -> None:
        """Nothing to do."""
