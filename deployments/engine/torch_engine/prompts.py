"""The prompts that come with the package, for fitting a draft on a target's own answers."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from transformers import AutoTokenizer

if TYPE_CHECKING:
    from pathlib import Path


def bundled_prompts(model_folder: Path) -> list[list[int]]:
    """The prompts as a chat's first turn, in the model's own template.

    Args:
        model_folder: holds the tokenizer's files.

    Returns:
        Token ids up to where the answer begins.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    source = files("deployments.engine.torch_engine") / "data" / "student_prompts.txt"
    lines = source.read_text(encoding="utf-8").splitlines()
    if tokenizer.chat_template is None:
        return [list(tokenizer(line).input_ids) for line in lines if line]
    return [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": line}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for line in lines
        if line
    ]
