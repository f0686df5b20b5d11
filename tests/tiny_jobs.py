"""``paceline train draft`` at its smallest: six tiny layers and sixteen prompts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.fakes_tokenizer import write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
_ENGINE = {"num_pages": 64, "max_num_seqs": 4, "num_threads": 1}
_TRAINING = {
    "answers": {"max_tokens": 24, "held_out_prompts": 4},
    "run": {
        "draft_vocab_size": 64,
        "objective": {"num_unrolls": 2},
        "batch_tokens": 256,
        "max_length": 128,
        "num_draft_tokens": 3,
    },
}


def write_model(folder: Path, **changes: int) -> Path:
    """A Llama with the byte tokenizer; its folder is made."""
    write_tokenizer(folder)
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).save_pretrained(folder)
    return folder


def write_job(folder: Path, model: Path, **changes: dict[str, Any]) -> None:
    """Write ``c.yaml`` and ``p.txt``.

    Args:
        folder: of both; its ``cache`` is the cache.
        model: the target's folder.
        changes: by section, merged into the settings.
    """
    settings: dict[str, Any] = {
        "cache_dir": str(folder / "cache"),
        "engine": _ENGINE | {"model": str(model)},
        "training": _TRAINING,
    }
    (folder / "c.yaml").write_text(json.dumps(_merged(settings, changes)), encoding="utf-8")
    prompts = "".join(f"question {i} of some\n" for i in range(16))
    (folder / "p.txt").write_text(prompts, encoding="utf-8")


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    inner = {
        name: _merged(settings.get(name, {}), value)
        for name, value in changes.items()
        if isinstance(value, dict)
    }
    return settings | changes | inner
