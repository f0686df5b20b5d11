"""What is asked, and when: prompts of a file, of given lengths, or of a public trace."""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from itertools import cycle
from typing import TYPE_CHECKING, Any

from cluster.errors import ConfigError
from cluster.training_prompts import read_conversations

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

# Ids of made-up prompts: plain tokens in every vocabulary of today's models, no special ones.
_FIRST_ID, _NUM_IDS = 1000, 8000
_MOONCAKE_BLOCK = 512
_QUESTIONS = "student_prompts.txt"
_COLUMNS = (
    ("arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """One request of a schedule.

    Attributes:
        at_s: when it leaves, from the start.
        prompt: a user's message, or token ids that are completed as they are.
        max_tokens: of the answer.
        ignore_eos: the answer has exactly ``max_tokens``.
    """

    at_s: float
    prompt: str | tuple[int, ...]
    max_tokens: int
    ignore_eos: bool


def read_questions(path: Path) -> list[str]:
    """The last user message of every line: text, or ``.jsonl`` as ``paceline train`` takes it.

    Raises:
        ConfigError: the file cannot be read, or holds something else.
    """
    conversations = read_conversations(path, "--prompts")
    return [turns[-1].content for _, turns in conversations]


def builtin_questions() -> list[str]:
    """The package's own, without a system prompt."""
    source = files("deployments.engine.torch_engine") / "data" / _QUESTIONS
    return [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]


def of_questions(
    times: Iterable[float], questions: Sequence[str], max_tokens: int
) -> Iterator[LoadRequest]:
    """Questions in their order, again from the first when they are used up."""
    for at_s, question in zip(times, cycle(questions), strict=False):
        yield LoadRequest(at_s=at_s, prompt=question, max_tokens=max_tokens, ignore_eos=False)


def of_lengths(
    times: Iterable[float], num_prompt_tokens: int, max_tokens: int, seed: int
) -> Iterator[LoadRequest]:
    """Prompts of one length that share nothing, and answers of one length."""
    for index, at_s in enumerate(times):
        ids = _block(f"{seed}/{index}", num_prompt_tokens)
        yield LoadRequest(at_s=at_s, prompt=ids, max_tokens=max_tokens, ignore_eos=True)


def of_trace(path: Path, *, speed: float, scale: float, seconds: float) -> Iterator[LoadRequest]:
    """Requests of a public trace.

    Mooncake's JSON lines (``timestamp`` in ms, lengths, ``hash_ids`` of blocks of 512 tokens) keep
    which prompts share which blocks; Azure's CSV (times in seconds, lengths) shares nothing.

    Args:
        path: of the trace.
        speed: how many of its seconds pass in one.
        scale: of all lengths, block lengths included.
        seconds: of the schedule; later requests are left out.

    Raises:
        ConfigError: the file cannot be read, or is neither.
    """
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = _mooncake(lines) if path.suffix == ".jsonl" else _azure(lines)
            for at_s, num_prompt, num_output, hashes in rows:
                if at_s / speed >= seconds:
                    return
                yield LoadRequest(
                    at_s=at_s / speed,
                    prompt=_shared_prompt(hashes, num_prompt, scale),
                    max_tokens=max(1, round(num_output * scale)),
                    ignore_eos=True,
                )
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ConfigError((f"--trace: {path}: {reason}",)) from error


_Row = tuple[float, int, int, "list[Any]"]


def _mooncake(lines: Iterable[str]) -> Iterator[_Row]:
    for line in lines:
        row = json.loads(line)
        yield row["timestamp"] / 1000, row["input_length"], row["output_length"], row["hash_ids"]


def _azure(lines: Iterable[str]) -> Iterator[_Row]:
    rows = csv.DictReader(lines)
    known = [names for names in _COLUMNS if set(names) <= set(rows.fieldnames or ())]
    if not known:
        raise ValueError("neither Mooncake's .jsonl nor a CSV with Azure's columns")
    time, prompt, output = known[0]
    start: datetime | None = None
    for number, row in enumerate(rows):
        if time == "arrived_at":
            at_s = float(row[time])
        else:
            # Seven digits behind the point; Python takes six.
            moment = datetime.fromisoformat(row[time][:26])
            start = start or moment
            at_s = (moment - start).total_seconds()
        num_prompt = int(row[prompt])
        blocks = [f"{number}/{index}" for index in range(num_prompt // _MOONCAKE_BLOCK + 1)]
        yield at_s, num_prompt, int(row[output]), blocks


def _shared_prompt(hashes: Sequence[Any], num_tokens: int, scale: float) -> tuple[int, ...]:
    block = max(1, round(_MOONCAKE_BLOCK * scale))
    ids = [each for name in hashes for each in _block(str(name), block)]
    return tuple(ids[: max(1, round(num_tokens * scale))])


def _block(name: str, num_tokens: int) -> tuple[int, ...]:
    draw = random.Random(name)  # noqa: S311 - filler, no secret
    return tuple(draw.randrange(_FIRST_ID, _FIRST_ID + _NUM_IDS) for _ in range(num_tokens))
