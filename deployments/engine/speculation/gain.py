"""What drafts are worth: the time of steps, and that of plain steps for the same tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deployments.engine.speculation.step_times import StepTimes


class GainMeter:
    """Sums over all steps whose plain time is known.

    Attributes:
        step_time_s: that steps took.
        plain_time_s: that steps without drafts would have taken for as many tokens.
    """

    def __init__(self) -> None:
        self.step_time_s = 0.0
        self.plain_time_s = 0.0
        self._num_rows = 0
        self._num_tokens = 0

    def begin(self, num_rows: int, num_tokens: int) -> None:
        """A step begins that computed and gave so much without drafts."""
        self._num_rows, self._num_tokens = num_rows, num_tokens

    def end(self, times: StepTimes, seconds: float, num_gained: int) -> None:
        """It took so long, and gave so many tokens more; its own time is not in ``times`` yet."""
        if not times.is_known or not self._num_tokens:
            return
        self.step_time_s += seconds
        plain_s = times.seconds(self._num_rows)
        self.plain_time_s += plain_s * (self._num_tokens + num_gained) / self._num_tokens
