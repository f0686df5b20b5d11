"""What the target's speculator keeps of a running sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.speculation.draft_source import NOTHING, Guess, Merged, Priors, Trust

if TYPE_CHECKING:
    from deployments.engine.speculation.types import SessionSpec

_TRIAL_INTERVAL_ROUNDS = 16
"""Rounds without a draft after which a token is worth a trial."""


class RunningSequence:
    """Used by the engine thread alone.

    Attributes:
        guesses: that were at hand last.
        merged: the tree of them.
    """

    __slots__ = ("guesses", "merged", "num_withheld_rounds", "spec", "trust")

    def __init__(self, spec: SessionSpec, priors: Priors) -> None:
        self.spec = spec
        self.trust = Trust(priors)
        self.guesses: tuple[Guess, ...] = ()
        self.merged: Merged = NOTHING
        self.num_withheld_rounds = 0

    def is_due(self) -> bool:
        """Whether nothing was verified for long."""
        return self.num_withheld_rounds >= _TRIAL_INTERVAL_ROUNDS

    def make_due(self) -> None:
        """As if nothing had been verified for long."""
        self.num_withheld_rounds = _TRIAL_INTERVAL_ROUNDS
