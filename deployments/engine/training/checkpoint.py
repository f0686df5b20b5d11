"""A trained head as files: the folder that SGLang and this engine's drafter load."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from deployments.engine.torch_engine.weights.eagle3 import ARCHITECTURE, WEIGHTS_FILE, read_head
from deployments.engine.training.eagle3 import Eagle3Head

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from deployments.engine.torch_engine.eagle3 import Eagle3Config


def save_head(head: Eagle3Head, folder: Path, dtype: torch.dtype) -> None:
    """Write a head's folder.

    Args:
        head: on any device.
        folder: made where it is missing; what it holds of an earlier export is written over.
        dtype: of the stored weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in head.state_dict().items()
    }
    partial = folder / f"{WEIGHTS_FILE}.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    config = _hf_config(head.config, str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / WEIGHTS_FILE)


def load_head(folder: Path) -> Eagle3Head:
    """Read a head's folder to train on, in float32.

    Raises:
        EngineError: as ``weights.eagle3.read_head``.
    """
    config, tensors = read_head(folder)
    head = Eagle3Head(config)
    head.load_state_dict(tensors)
    return head.eval()


def _hf_config(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rope.theta}
    if config.rope.scaling == "linear":
        rope["rope_scaling"] = {"rope_type": "linear", "factor": config.rope.factor}
    elif config.rope.scaling == "llama3":
        rope["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope.factor,
            "low_freq_factor": config.rope.low_freq_factor,
            "high_freq_factor": config.rope.high_freq_factor,
            "original_max_position_embeddings": config.rope.original_max_positions,
        }
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_positions,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": dtype,
        **rope,
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(config.aux_layers),
            "use_aux_hidden_state": True,
        },
    }
