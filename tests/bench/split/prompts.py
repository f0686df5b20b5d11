"""What the split benchmark asks. None of it is among the prompts that drafts are fitted on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_DATA = Path("tests/data")
_OTHERS = Path("deployments/engine/torch_engine/data/student_prompts.txt")
_LIST = "apples, bread, butter, cheese, eggs, flour, grapes, honey, lemons, milk, onions, rice"
_CODE = """def area(width, height):
    result = width * height
    return result


def volume(width, height, depth):
    result = width * height * depth
    return result
"""
_TEXT = (
    "The bridge was closed in March because two of its bearings had cracked. Engineers replaced "
    "them in May, and since June trams cross it again at walking speed."
)
_REPEATING = (
    f"Repeat this list exactly, twice, with nothing else: {_LIST}.",
    f"Copy this code, and rename result to product:\n\n{_CODE}",
    f"Quote the following paragraph word by word, then quote it again:\n\n{_TEXT}",
    f"Write this list with one item per line:\n\n{_LIST}",
)


def prompts() -> dict[str, tuple[str, ...]]:
    """Questions by kind: open ones, sums, and such whose answers say again what was said."""
    return {
        "MT-bench": mt_bench()[::2],
        "GSM8K": _gsm8k()[::2],
        "repeating": _REPEATING,
    }


def other_prompts() -> dict[str, tuple[str, ...]]:
    """Questions of the same kinds that ``prompts`` does not ask, and those of training."""
    others = _OTHERS.read_text(encoding="utf-8").splitlines()
    return {"MT-bench": mt_bench()[1::2], "GSM8K": _gsm8k()[1::2], "others": tuple(others)}


def mt_bench() -> tuple[str, ...]:
    """All first turns."""
    return tuple(line["turns"][0] for line in _lines("mt_bench"))


def _gsm8k() -> tuple[str, ...]:
    return tuple(line["question"] for line in _lines("gsm8k"))


def _lines(name: str) -> list[dict[str, Any]]:
    text = (_DATA / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
