"""What the target's speculator keeps of a running sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.speculation.draft_source import NOTHING, Guess, Merged, Priors, Trust

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deployments.engine.speculation.types import SessionSpec

PROBE_INTERVAL_ROUNDS = 16
"""Rounds without a draft after which one token is verified whatever it costs."""
_PROBE_WORTH = 2.0
"""Tokens: what is learned from a draft token that would not pay counts like more than one."""


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

    @property
    def chances(self) -> Sequence[float]:
        """That each draft token at hand is accepted, with all before it."""
        if self.merged.chances and self.num_withheld_rounds >= PROBE_INTERVAL_ROUNDS:
            return (_PROBE_WORTH,)
        return self.merged.chances
