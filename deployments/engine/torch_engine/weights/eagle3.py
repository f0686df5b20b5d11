"""Reads draft heads: ``LlamaForCausalLMEagle3`` folders, as SGLang loads them.

SGLang skips tensor names that it does not know and leaves absent ones at zero; here every name must
be there and none more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from deployments.engine.errors import (
    UnsupportedModelError,
    WeightsMismatchError,
    WeightsMissingError,
)
from deployments.engine.torch_engine.eagle3 import Eagle3Config, Eagle3Model
from deployments.engine.torch_engine.model_config import rope_config
from deployments.engine.torch_engine.weights.folders import read_settings

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from deployments.engine.torch_engine.models.llama import Model

ARCHITECTURE = "LlamaForCausalLMEagle3"
WEIGHTS_FILE = "model.safetensors"


class HeadFiles(NamedTuple):
    """What a head's folder holds.

    Attributes:
        tensors: by the checkpoint's names, of the config's shapes, in the checkpoint's dtype.
    """

    config: Eagle3Config
    tensors: dict[str, Tensor]

    @property
    def draft_token_ids(self) -> Tensor:
        """[d] int64 ascending: the target's id of each token of the draft vocabulary."""
        offsets = self.tensors["d2t"]
        return torch.arange(len(offsets)) + offsets


def read_head(folder: Path) -> HeadFiles:
    """Read and check a head's folder.

    Raises:
        WeightsMissingError: a file is not there.
        UnsupportedModelError: it is another architecture, or asks for what is not computed.
        WeightsMismatchError: a tensor is missing, unknown or of another shape, or the draft
            vocabulary contradicts itself.
    """
    config = _read_config(read_settings(folder))
    if not (folder / WEIGHTS_FILE).is_file():
        raise WeightsMissingError(f"{folder} has no {WEIGHTS_FILE}")
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise WeightsMismatchError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
    _check_tensors(config, tensors)
    files = HeadFiles(config, tensors)
    _check_vocabulary(files)
    return files


def load_head(folder: Path, target: Model) -> Eagle3Model:
    """Load a head to run beside its target: on the same device, in the arithmetic it computes in.

    Raises:
        WeightsMissingError: as ``read_head``.
        UnsupportedModelError: as ``read_head``.
        WeightsMismatchError: as ``read_head``, or the head belongs to another target.
    """
    files = read_head(folder)
    _check_target(files.config, target)
    head = Eagle3Model(files.config, dtype=target.compute_dtype, device=target.device)
    with torch.no_grad():
        for name, place in head.weight_targets().items():
            place.copy_(files.tensors[name])
        head.draft_token_ids.copy_(files.draft_token_ids)
    return head.eval()


def _check_target(config: Eagle3Config, target: Model) -> None:
    own = target.config
    for what, theirs, ours in (
        ("hidden size", config.hidden_size, own.hidden_size),
        ("vocabulary", config.vocab_size, own.vocab_size),
    ):
        if theirs != ours:
            raise WeightsMismatchError(
                f"the draft head is for a target with a {what} of {theirs}, not {ours}"
            )
    if not all(0 <= layer < own.num_layers for layer in config.aux_layers):
        raise WeightsMismatchError(
            f"the draft head reads layers {config.aux_layers} of a target that has {own.num_layers}"
        )


def _check_tensors(config: Eagle3Config, tensors: dict[str, Tensor]) -> None:
    places = Eagle3Model(config, dtype=torch.float32, device="meta").weight_targets()
    shapes = {name: place.shape for name, place in places.items()} | {
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
    }
    for problem, names in (
        ("missing", shapes.keys() - tensors.keys()),
        ("unknown", tensors.keys() - shapes.keys()),
    ):
        if names:
            raise WeightsMismatchError(f"tensor {min(names)!r} is {problem}")
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise WeightsMismatchError(
                f"tensor {name!r} is {tuple(tensor.shape)}, the config says {tuple(shapes[name])}"
            )


def _check_vocabulary(files: HeadFiles) -> None:
    ids, is_drafted = files.draft_token_ids, files.tensors["t2d"]
    is_ascending = bool((ids[1:] > ids[:-1]).all())
    if not is_ascending or ids[0] < 0 or ids[-1] >= files.config.vocab_size:
        raise WeightsMismatchError("d2t: its offsets do not lead to ascending ids of the target")
    if not torch.equal(is_drafted.nonzero().flatten(), ids):
        raise WeightsMismatchError("t2d and d2t name different draft vocabularies")


def _read_config(raw: dict[str, Any]) -> Eagle3Config:
    if raw.get("architectures") != [ARCHITECTURE]:
        raise UnsupportedModelError(f"a draft head is {ARCHITECTURE}: {raw.get('architectures')}")
    for flag in ("fc_norm", "norm_output", "attention_bias", "mlp_bias"):
        if raw.get(flag):
            raise UnsupportedModelError(f"draft heads with {flag!r} are not computed")
    if raw.get("num_hidden_layers", 1) != 1:
        raise UnsupportedModelError("draft heads of more than one layer are not computed")
    try:
        num_heads = int(raw["num_attention_heads"])
        low, middle, high = raw["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        config = Eagle3Config(
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
    if raw.get("target_hidden_size", config.hidden_size) != config.hidden_size:
        raise UnsupportedModelError("draft heads narrower or wider than their target")
    return config
