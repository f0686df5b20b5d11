"""What the target's speculator keeps of a running sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.speculation.draft_source import NOTHING, Guess, Merged, Priors, Trust
from deployments.engine.speculation.types import DraftOrigin

if TYPE_CHECKING:
    from deployments.engine.speculation.types import DraftTree, SessionSpec

_TRIAL_INTERVAL_ROUNDS = 16
"""Rounds without a draft after which a token is worth a trial."""
_POOL_PATIENCE_ROUNDS = 4
"""Rounds in which the pool's tokens fit and none was verified, or it had none at all, after which
it is asked no more."""


class RunningSequence:
    """Used by the engine thread alone.

    Attributes:
        guesses: that were at hand last.
        merged: the tree of them.
        is_pool_silent: its newest table holds no row, whatever the text may be.
    """

    __slots__ = (
        "_is_resting",
        "_num_unused_rounds",
        "_num_withheld_rounds",
        "guesses",
        "is_pool_silent",
        "merged",
        "spec",
        "trust",
    )

    def __init__(self, spec: SessionSpec, priors: Priors, *, takes_trees: bool = True) -> None:
        self.spec = spec
        self.trust = Trust(priors, takes_trees=takes_trees)
        self.guesses: tuple[Guess, ...] = ()
        self.merged: Merged = NOTHING
        self.is_pool_silent = False
        self._num_withheld_rounds = 0
        self._num_unused_rounds = 0
        self._is_resting = False

    def is_due(self) -> bool:
        """Whether nothing was verified for long."""
        return self._num_withheld_rounds >= _TRIAL_INTERVAL_ROUNDS

    def make_due(self) -> None:
        """As if nothing had been verified for long."""
        self._num_withheld_rounds = _TRIAL_INTERVAL_ROUNDS

    def on_round(self, verified: DraftTree, *, had_draft: bool, had_pool_row: bool) -> None:
        """Learn what a round makes of what was at hand."""
        if len(verified):
            self._num_withheld_rounds = 0
        elif had_draft or self._is_resting:
            self._num_withheld_rounds += 1
        if DraftOrigin.POOL in verified.origins:
            self._num_unused_rounds = 0
        elif had_pool_row or self.is_pool_silent or self._is_resting:
            self._num_unused_rounds += 1

    def asks_pool(self) -> bool:
        """Whether to ask the pool in this round; once a round.

        A pool whose tokens are not worth verifying is spared: it is asked again when what it says
        comes in time for a trial.
        """
        place = self._num_unused_rounds % _TRIAL_INTERVAL_ROUNDS
        self._is_resting = (
            self._num_unused_rounds >= _POOL_PATIENCE_ROUNDS and place != _TRIAL_INTERVAL_ROUNDS - 1
        )
        return not self._is_resting
