"""The card that a trained draft comes with."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cluster.draft_curve import extrapolation, points_of
from deployments.engine.training.tree_shape import TreeShape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cluster.training_prompts import PromptSource
    from deployments.engine.training.config import DraftTrainingConfig
    from deployments.engine.training.report import JobReport
    from deployments.engine.training.run import CurvePoint

_CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCard:
    """What a card tells.

    Attributes:
        target: the model that the draft guesses for.
        sources: of the prompts that were trained on, and of those held out where none are named.
        held_out: sources of held-out prompts only.
        training: settings; the card names those that are not the default.
        command_line: that made the draft.
        has_picture: whether ``curve.png`` lies beside the card.
    """

    target: str
    sources: tuple[PromptSource, ...]
    held_out: tuple[PromptSource, ...]
    num_training_prompts: int
    num_held_out_prompts: int
    training: DraftTrainingConfig
    report: JobReport
    command_line: str
    has_picture: bool


def write_card(card: DraftCard, folder: Path) -> None:
    """Write ``README.md`` into a draft's folder."""
    (folder / _CARD).write_text("\n".join(_lines(card)) + "\n", encoding="utf-8")


def _lines(card: DraftCard) -> Iterator[str]:
    report, run = card.report, card.training.run
    yield f"# A draft for {card.target}"
    yield ""
    yield (
        f"{_kind(card)} of {report.num_weights / 1e6:.1f} million trained weights that guesses "
        f"what {card.target} writes next, among {run.draft_vocab_size} tokens. {_use(card)}"
    )
    yield ""
    yield "## Quality"
    yield ""
    yield (
        f"Greedy chains on {card.num_held_out_prompts} held-out prompts, drafted behind each of "
        f"{report.best.quality.num_positions} positions of the target's greedy answers; "
        f"{report.best.quality.coverage:.1%} of their tokens can be drafted. Sampled text was not "
        "measured."
    )
    yield ""
    yield from _quality(report)
    yield ""
    yield from _worth(report, TreeShape(run.tree_widths))
    if card.has_picture:
        yield ""
        yield "![Quality against tokens trained on](curve.png)"
    yield ""
    yield from extrapolation(points_of(report), report.best.quality.coverage)
    yield ""
    yield "## Data"
    yield ""
    if report.is_self_chat:
        count = card.training.self_chat.num_texts - report.num_left_out
        yield (
            f"{count} chats that the target wrote itself, prompts and answers; "
            f"{report.num_left_out} more were left out for want of room. No data set was used to "
            "train on."
        )
    else:
        yield "Prompts only; all answers were written by the target itself."
    if card.sources or card.held_out:
        yield ""
        yield from _sources(card)
    yield ""
    yield "## Making"
    yield ""
    yield from _making(report)
    yield ""
    yield f"Machine: {_machine()}."
    yield ""
    yield "```shell"
    yield card.command_line
    yield "```"
    changed = card.training.model_dump(exclude_defaults=True)
    if changed:
        yield ""
        yield "Settings that differ from the defaults:"
        yield ""
        for path, value in _flat("training", changed):
            yield f"- `{path}: {value}`"


def _kind(card: DraftCard) -> str:
    if card.training.method == "eagle3":
        return "An EAGLE-3 head"
    shape = card.training.student
    return (
        f"A student (the target's first {shape.first_layers} and last {shape.last_layers} layers, "
        "joined by a linear map, in eight bits)"
    )


def _use(card: DraftCard) -> str:
    if card.training.method == "eagle3":
        return (
            "It reads the target's features and is of no use without it. The format is SGLang's "
            "`LlamaForCausalLMEagle3`."
        )
    return "Embedding and head are the target's, whose files it needs. Draft replicas run it."


def _sources(card: DraftCard) -> Iterator[str]:
    yield "| file | prompts | licence | digest (BLAKE2b, 128 bits) |"
    yield "|---|---|---|---|"
    for source in card.sources:
        yield f"| {source.name} | {len(source.prompts)} | {source.licence} | `{source.digest}` |"
    for source in card.held_out:
        yield (
            f"| {source.name} (held out) | {len(source.prompts)} | {source.licence} "
            f"| `{source.digest}` |"
        )
    if card.sources:
        yield ""
        yield (
            f"{card.num_training_prompts} distinct prompts were trained on, with "
            f"{card.training.answers.per_prompt} answers each; {card.report.num_left_out} texts "
            "were left out for want of room."
        )


def _quality(report: JobReport) -> Iterator[str]:
    chains = range(1, len(report.best.quality.acceptance) + 1)
    yield "| | " + " | ".join(f"K = {chain}" for chain in chains) + " |"
    yield "|---|" + "---|" * len(chains)

    def row(name: str, values: tuple[float, ...]) -> str:
        return f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + " |"

    points: tuple[tuple[str, CurvePoint], ...] = (
        ("before training", report.curve[0]),
        ("this draft", report.best),
    )
    for name, point in points:
        quality = point.quality
        yield row(
            f"tokens a round of K draft tokens commits, {name}", quality.mean_acceptance_length
        )
    for name, point in points:
        yield row(f"share accepted at position K, {name}", point.quality.acceptance)
    for name, point in points:
        yield row(f"predicted speed-up of K draft tokens, {name}", point.speed_ups.chains)


def _worth(report: JobReport, tree: TreeShape) -> Iterator[str]:
    """What a tree gives, and from what speed-ups are predicted."""
    costs, best = report.costs, report.best

    def shown(seconds_of: Mapping[int, float]) -> str:
        rows = (f"{seconds * 1e3:.3g} ms for {count}" for count, seconds in seconds_of.items())
        return ", ".join(rows)

    yield (
        f"A tree of {tree.describe()}, always the draft's likeliest tokens, commits "
        f"{best.quality.tree_acceptance_length:.3f} a round "
        f"({report.curve[0].quality.tree_acceptance_length:.3f} before training); predicted "
        f"speed-up {best.speed_ups.tree:.3f}."
    )
    yield ""
    yield (
        "Predicted: drafted in line, one sequence alone, against plain decoding, from what a step "
        f"takes by its rows. Target: {shown(costs.target_s)}. Draft: {shown(costs.draft_s)}."
    )


def _making(report: JobReport) -> Iterator[str]:
    last = report.curve[-1]
    captured = "texts written, features kept" if report.is_self_chat else "features captured"
    rows = (
        ("answers to given prompts", report.answers.num_tokens, report.answers.seconds),
        (captured, report.features.num_tokens, report.features.seconds),
        ("training, evaluations included", last.num_tokens, last.seconds),
    )
    yield "| stage | tokens | seconds | tokens/s |"
    yield "|---|---|---|---|"
    for name, num_tokens, seconds in rows:
        yield f"| {name} | {num_tokens} | {seconds:.0f} | {num_tokens / max(seconds, 1e-9):.0f} |"
    yield ""
    yield f"The draft was kept after step {report.best.step} of {last.step}. {_storage(report)}"


def _storage(report: JobReport) -> str:
    queue = report.queue
    stored = f"{report.num_features_bytes / 1e6:.0f} MB on disk"
    if queue is None:
        return f"The features took {stored}."
    return (
        f"Held-out features took {stored}; all others went from the target to the training through "
        f"memory: {queue.num_taken} texts, of which at most {queue.most_bytes / 1e6:.0f} MB waited "
        f"({queue.max_bytes / 1e6:.0f} MB allowed)."
    )


def _machine() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in _cpuinfo().splitlines()
        if line.startswith("model name")
    ]
    cpu = names[0] if names else platform.machine()
    memory = psutil.virtual_memory().total / (1 << 30)
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu}, {memory:.0f} GiB, torch {version('torch')}"
    )


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _flat(prefix: str, settings: dict[str, object]) -> Iterator[tuple[str, object]]:
    for name, value in settings.items():
        path = f"{prefix}.{name}"
        if isinstance(value, dict):
            yield from _flat(path, value)
        else:
            yield path, value
