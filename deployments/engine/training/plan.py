"""Which texts make which optimiser step: a pure function of lengths, seed and epoch."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from deployments.engine.training.config import TrainingConfig


class PlannedStep(NamedTuple):
    """One optimiser step.

    Attributes:
        batches: indices of the texts of each.
        end: where it ends, on a way as long as ``Plan.end``; the learning rate follows it.
    """

    batches: list[list[int]]
    end: float


class Plan(Protocol):
    """The steps of a whole run."""

    @property
    def end(self) -> float:
        """Where the last step ends."""

    @property
    def num_steps(self) -> int | None:
        """Of the run; None as long as not all lengths are known."""

    def steps(self, num_done: int) -> Iterator[PlannedStep]:
        """All steps behind the first ``num_done`` ones; the same ones every time."""


class WholePlan:
    """Every epoch goes over all texts in an order of its own."""

    def __init__(self, lengths: Sequence[int], config: TrainingConfig) -> None:
        """Plan texts of these lengths."""
        self._steps = [
            step for epoch in range(config.epochs) for step in _epoch_steps(lengths, config, epoch)
        ]

    @property
    def end(self) -> float:
        """As many as there are steps."""
        return len(self._steps)

    @property
    def num_steps(self) -> int:
        """Of all epochs."""
        return len(self._steps)

    def steps(self, num_done: int) -> Iterator[PlannedStep]:
        """See ``Plan``."""
        for index, step in enumerate(self._steps[num_done:], num_done):
            yield PlannedStep(step, index + 1)


class GroupedPlan:
    """The first epoch goes group by group, so that it can begin before the last text is written.

    How many steps a group makes is not known before its texts are, so the way is counted in texts.
    """

    def __init__(
        self,
        num_texts: int,
        group_texts: int,
        lengths_of: Callable[[range], list[int]],
        config: TrainingConfig,
    ) -> None:
        """Plan texts that may not be there yet.

        Args:
            num_texts: of the run.
            group_texts: of a group; the last one may have fewer.
            lengths_of: waits until these texts are there; 0 for one that is not trained on.
            config: of the run.
        """
        starts = range(0, num_texts, group_texts)
        self._groups = [range(start, min(start + group_texts, num_texts)) for start in starts]
        self._num_texts = num_texts
        self._lengths_of = lengths_of
        self._config = config
        self.num_steps: int | None = None

    @property
    def end(self) -> float:
        """As many as there are texts, in all epochs."""
        return self._num_texts * self._config.epochs

    def steps(self, num_done: int) -> Iterator[PlannedStep]:
        """See ``Plan``; waits for the texts of a group before its first step."""
        count = 0
        for texts, epoch, begin in self._passes():
            planned = self._planned(texts, epoch)
            for index, step in enumerate(planned):
                count += 1
                if count > num_done:
                    yield PlannedStep(step, begin + len(texts) * (index + 1) / len(planned))
        self.num_steps = count

    def _passes(self) -> Iterator[tuple[range, int, int]]:
        """Texts, epoch, and what was gone before."""
        for group in self._groups:
            yield group, 0, group.start
        for epoch in range(1, self._config.epochs):
            yield range(self._num_texts), epoch, epoch * self._num_texts

    def _planned(self, texts: range, epoch: int) -> list[list[list[int]]]:
        known = zip(texts, self._lengths_of(texts), strict=True)
        used = [(index, length) for index, length in known if length]
        steps = _epoch_steps([length for _, length in used], self._config, epoch)
        return [[[used[place][0] for place in batch] for batch in step] for step in steps]


def _epoch_steps(
    lengths: Sequence[int], config: TrainingConfig, epoch: int
) -> list[list[list[int]]]:
    return plan_epoch(
        lengths,
        batch_tokens=config.batch_tokens,
        accumulate=config.accumulate,
        seed=config.seed,
        epoch=epoch,
    )


def plan_epoch(
    lengths: Sequence[int], *, batch_tokens: int, accumulate: int, seed: int, epoch: int
) -> list[list[list[int]]]:
    """The steps of one pass.

    Texts are shuffled, then put into batches with their neighbours in length within a window, so
    that little is padded and the order stays random.

    Args:
        lengths: tokens of each text.
        batch_tokens: of one batch, padding included; at least one text.
        accumulate: batches of one step; the last step may have fewer.
        seed: of the run.
        epoch: counted from 0.

    Returns:
        Steps, each a list of batches, each a list of indices into ``lengths``.
    """
    shuffler = random.Random(f"{seed}/{epoch}")  # noqa: S311 - no secret, the same on all machines
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    window = 16 * max(1, batch_tokens // max(1, sum(lengths) // max(1, len(lengths))))
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda index: (lengths[index], index))
        batches.extend(_fill(near, lengths, batch_tokens))
    shuffler.shuffle(batches)
    return [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]


def share(batch: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The texts of a batch that one of several processes takes."""
    return list(batch[rank::world_size])


def _fill(near: Sequence[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    for index in near:
        # Lengths ascend, so this one is the batch's widest.
        if batches[-1] and (len(batches[-1]) + 1) * lengths[index] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return [batch for batch in batches if batch]
