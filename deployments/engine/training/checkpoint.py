"""A trained head as files: the ``LlamaForCausalLMEagle3`` folder that SGLang and this engine load.

SGLang skips tensor names that it does not know and leaves absent ones at zero; here every name must
be there and none more.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deployments.engine.errors import (
    UnsupportedModelError,
    WeightsMismatchError,
    WeightsMissingError,
)
from deployments.engine.torch_engine.model_config import rope_config
from deployments.engine.training.eagle3 import Eagle3Config, Eagle3Head

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_ARCHITECTURE = "LlamaForCausalLMEagle3"
_WEIGHTS = "model.safetensors"


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
    partial = folder / f"{_WEIGHTS}.partial"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    config = _hf_config(head.config, str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / _WEIGHTS)


def load_head(folder: Path) -> Eagle3Head:
    """Read a head's folder, in float32.

    Raises:
        WeightsMissingError: a file is not there.
        UnsupportedModelError: it is another architecture, or asks for what is not computed.
        WeightsMismatchError: a tensor is missing, unknown or of another shape, or the draft
            vocabulary contradicts itself.
    """
    for name in ("config.json", _WEIGHTS):
        if not (folder / name).is_file():
            raise WeightsMissingError(f"{folder} has no {name}")
    head = Eagle3Head(_read_config(json.loads((folder / "config.json").read_text("utf-8"))))
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise WeightsMismatchError(f"{folder / _WEIGHTS} cannot be read: {error}") from error
    places = head.state_dict()
    for problem, names in (
        ("missing", places.keys() - tensors),
        ("unknown", tensors - places.keys()),
    ):
        if names:
            raise WeightsMismatchError(f"tensor {min(names)!r} is {problem}")
    for name, tensor in tensors.items():
        if places[name].shape != tensor.shape:
            raise WeightsMismatchError(
                f"tensor {name!r} is {tuple(tensor.shape)}, the config says "
                f"{tuple(places[name].shape)}"
            )
    head.load_state_dict(tensors)
    is_drafted = head.get_buffer("t2d")
    try:
        head.set_draft_vocabulary(head.draft_token_ids)
    except ValueError as error:
        raise WeightsMismatchError(f"d2t: {error}") from error
    if not bool((tensors["t2d"] == is_drafted).all()) or is_drafted.sum() != len(tensors["d2t"]):
        raise WeightsMismatchError("t2d and d2t name different draft vocabularies")
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
        "architectures": [_ARCHITECTURE],
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


def _read_config(raw: dict[str, Any]) -> Eagle3Config:
    if raw.get("architectures") != [_ARCHITECTURE]:
        raise UnsupportedModelError(f"a draft head is {_ARCHITECTURE}: {raw.get('architectures')}")
    for flag in ("fc_norm", "norm_output", "attention_bias", "mlp_bias"):
        if raw.get(flag):
            raise UnsupportedModelError(f"draft heads with {flag!r} are not computed")
    if raw.get("num_hidden_layers", 1) != 1:
        raise UnsupportedModelError("draft heads of more than one layer are not computed")
    try:
        num_heads = int(raw["num_attention_heads"])
        low, middle, high = raw["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        return Eagle3Config(
            hidden_size=int(raw["hidden_size"]),
            num_heads=num_heads,
            num_kv_heads=int(raw.get("num_key_value_heads") or num_heads),
            head_dim=int(raw.get("head_dim") or raw["hidden_size"] // num_heads),
            intermediate_size=int(raw["intermediate_size"]),
            rms_norm_eps=float(raw["rms_norm_eps"]),
            rope=rope_config(raw),
            vocab_size=int(raw["vocab_size"]),
            draft_vocab_size=int(raw["draft_vocab_size"]),
            aux_layers=(low, middle, high),
            max_positions=int(raw["max_position_embeddings"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise UnsupportedModelError(f"config.json of the draft head: {error!r}") from error
