"""The target of the GPU benchmark: the default model, a folder, or a shape with random weights."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file

from deployments.engine.torch_engine.weights.builtin import prepare_builtin
from deployments.engine.torch_engine.weights.loader import default_cache_dir
from tests.sglang.dense_model import write_dense_model

if TYPE_CHECKING:
    from pathlib import Path

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "llama-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28_672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


class Target(NamedTuple):
    """A model that SGLang can load.

    Attributes:
        name: for the report.
        folder: its files.
        is_random: whether SGLang makes up its weights; then acceptance says nothing.
        is_default: whether the shipped drafts are its.
    """

    name: str
    folder: Path
    is_random: bool
    is_default: bool


def default_target(scratch: Path) -> Target:
    """The default model's own weights, one number each."""
    return Target("SmolLM2-135M-Instruct", write_dense_model(scratch / "model"), False, True)


def random_target(shape: str, scratch: Path) -> Target:
    """A Llama of this shape with the default model's tokenizer; SGLang draws the weights."""
    source = prepare_builtin(default_cache_dir(), print)
    folder = scratch / "model"
    folder.mkdir(parents=True)
    for path in source.glob("*.json"):
        if path.name not in {"prepared.json", "config.json"}:
            shutil.copy(path, folder)
    settings: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    settings |= SHAPES[shape] | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    # Whoever looks for weights finds a file; SGLang does not open it.
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    return Target(f"{shape}, random weights", folder, True, False)
