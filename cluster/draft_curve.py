"""Quality against tokens seen: as a table's figures, as a picture, and where it might lead.

The extrapolation is log-linear: acceptance of the first draft token gains as much with every
doubling of the tokens. Nothing shows that it stays so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import linear_regression
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from deployments.engine.training.report import JobReport

_CHAIN = 3
"""Draft tokens of the extrapolated rounds, where so many were measured."""
_AHEAD = 32
"""Times as many tokens as were seen, at the right edge of the picture."""


class CurvePoint(NamedTuple):
    """One evaluation, as far as it is known.

    Attributes:
        acceptance: by position in a chain.
        lengths: tokens a round commits, by its draft tokens.
        tree: the same with the evaluation's tree.
    """

    num_tokens: int
    acceptance: tuple[float, ...]
    lengths: Mapping[int, float]
    tree: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLinear:
    """First-token acceptance against the logarithm of the tokens seen.

    Attributes:
        num_tokens: at which ``acceptance`` holds.
        per_doubling: what twice as many add.
        ceiling: what it cannot exceed, the share of tokens that can be drafted.
    """

    num_tokens: float
    acceptance: float
    per_doubling: float
    ceiling: float = 1.0

    @classmethod
    def fit(cls, points: Iterable[CurvePoint], ceiling: float = 1.0) -> Self | None:
        """By least squares through all points behind the start; None below two of them."""
        seen = {point.num_tokens: point.acceptance[0] for point in points if point.num_tokens > 0}
        if len(seen) < 2:
            return None
        doublings = [math.log2(count) for count in seen]
        slope, at_one = linear_regression(doublings, list(seen.values()))
        last = max(seen)
        return cls(
            num_tokens=last,
            acceptance=at_one + slope * math.log2(last),
            per_doubling=slope,
            ceiling=ceiling,
        )

    def acceptance_at(self, num_tokens: float) -> float:
        """Within what is possible."""
        doublings = math.log2(num_tokens / self.num_tokens)
        return min(self.ceiling, max(0.0, self.acceptance + self.per_doubling * doublings))

    def length_at(self, num_tokens: float, num_draft_tokens: int) -> float:
        """Tokens a round commits if every position were accepted like the first one."""
        return tokens_per_round(self.acceptance_at(num_tokens), num_draft_tokens)


EARLIER = LogLinear(num_tokens=321_000, acceptance=0.331, per_doubling=0.028)
"""An EAGLE-3 head for SmolLM2-135M-Instruct, measured from 61,000 to 321,000 tokens before Paceline
trained drafts: to compare with, not a law."""


def tokens_per_round(acceptance: float, num_draft_tokens: int) -> float:
    """Of a chain whose every position has the same chance; the bonus token included."""
    return sum(acceptance**position for position in range(num_draft_tokens + 1))


def points_of(report: JobReport) -> list[CurvePoint]:
    """What a job measured."""
    return [
        CurvePoint(
            point.num_tokens,
            point.quality.acceptance,
            dict(enumerate(point.quality.mean_acceptance_length, start=1)),
            point.quality.tree_acceptance_length,
        )
        for point in report.curve
    ]


def chain_of(points: Sequence[CurvePoint]) -> int:
    """How many draft tokens the extrapolated rounds have."""
    return max(length for length in points[-1].lengths if length <= _CHAIN)


def extrapolation(points: Sequence[CurvePoint], ceiling: float) -> Iterable[str]:
    """A card's lines; none where there are fewer than two points behind the start."""
    own = LogLinear.fit(points, ceiling)
    if own is None:
        return
    chain, last = chain_of(points), points[-1]
    yield (
        "**Extrapolated, not measured:** the first token's acceptance as a straight line over the "
        f"logarithm of the tokens, fitted to the {sum(point.num_tokens > 0 for point in points)} "
        f"points behind the start ({own.per_doubling:+.3f} a doubling), and a round of {chain} as "
        "if every position were accepted like the first. Nothing shows that the line stays "
        "straight; repeated passes count as tokens, and the last points include the fall of the "
        "learning rate. For the last point "
        f"the line gives {own.length_at(last.num_tokens, chain):.3f} where "
        f"{last.lengths[chain]:.3f} was measured. Beside it the line of an earlier EAGLE-3 head "
        f"for SmolLM2-135M-Instruct ({EARLIER.acceptance:.3f} at "
        f"{EARLIER.num_tokens / 1e6:.2f} M tokens, {EARLIER.per_doubling:+.3f} a doubling)."
    )
    yield ""
    yield "| tokens | first token accepted | a round commits | earlier head: accepted | commits |"
    yield "|---|---|---|---|---|"
    for factor in (1, 4, 16):
        count = factor * last.num_tokens
        figures = (
            f"{line.acceptance_at(count):.2f} | {line.length_at(count, chain):.2f}"
            for line in (own, EARLIER)
        )
        yield f"| {_short(count)} | {' | '.join(figures)} |"


def draw_curve(points: Sequence[CurvePoint], path: Path, ceiling: float = 1.0) -> bool:
    """Write a picture; False where matplotlib is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    seen = [point for point in points if point.num_tokens > 0] or list(points)
    chain, own = chain_of(points), LogLinear.fit(points, ceiling)
    figure, (length, share) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for number in points[-1].lengths:
        label = f"{number} draft token" + ("s" if number > 1 else "")
        values = [point.lengths[number] for point in seen]
        _measured(length, seen, values, label, f"C{number - 1}", number == chain)
    if points[-1].tree is not None:
        trees = [math.nan if point.tree is None else point.tree for point in seen]
        _measured(length, seen, trees, "tree", "black", is_main=False)
    for position in range(len(points[-1].acceptance)):
        values = [point.acceptance[position] for point in seen]
        name = f"position {position + 1}"
        _measured(share, seen, values, name, f"C{position}", is_main=not position)
    start = points[0]
    if not start.num_tokens:
        _level(length, start.lengths[chain], f"{chain} draft tokens, before training")
        _level(share, start.acceptance[0], "position 1, before training")
    if own is not None:
        _ahead(length, share, own, seen[-1].num_tokens, chain)
    length.set_ylabel("tokens that a round commits")
    share.set_ylabel("accepted, of chains right so far")
    for axes in (length, share):
        if seen[0].num_tokens:
            axes.set_xscale("log")
        axes.set_xlabel("tokens trained on")
        axes.xaxis.set_major_formatter(lambda count, _: _short(count))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    figure.suptitle("greedy drafts on held-out prompts; dashed and dotted: extrapolated")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _measured(
    axes: Axes,
    points: Sequence[CurvePoint],
    values: Sequence[float],
    label: str,
    colour: str,
    is_main: bool,
) -> None:
    tokens = [point.num_tokens for point in points]
    width, size = (2.4, 5) if is_main else (1.2, 3)
    axes.plot(
        tokens, values, marker="o", markersize=size, linewidth=width, color=colour, label=label
    )


def _level(axes: Axes, value: float, label: str) -> None:
    axes.axhline(value, color="#888888", linewidth=1, linestyle=(0, (1, 3)), label=label)


def _ahead(length: Axes, share: Axes, own: LogLinear, last: int, chain: int) -> None:
    """Both lines, from what was seen to far beyond, on a shaded ground."""
    counts = [last * _AHEAD ** (step / 60) for step in range(-40, 61)]
    for line, label, style, colour in (
        (own, "fit to these points", "--", "#d1242f"),
        (EARLIER, "earlier EAGLE-3 head, SmolLM2-135M", ":", "#57606a"),
    ):
        share.plot(
            counts, [line.acceptance_at(x) for x in counts], style, color=colour, label=label
        )
        rounds = [line.length_at(x, chain) for x in counts]
        length.plot(counts, rounds, style, color=colour, label=f"{label}, {chain} draft tokens")
    for axes in (length, share):
        axes.axvspan(last, counts[-1], color="#eaeef2", alpha=0.6, linewidth=0)
        axes.text(
            math.sqrt(last * counts[-1]),
            0.06,
            "extrapolated",
            transform=axes.get_xaxis_transform(),
            ha="center",
            color="#57606a",
        )


def _short(count: float) -> str:
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:g}"
