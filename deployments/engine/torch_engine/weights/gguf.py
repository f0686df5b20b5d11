"""Reads GGUF files of the Llama architecture."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import gguf
import numpy as np
import torch

from deployments.engine.errors import UnsupportedModelError, WeightsMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_TABLE = "rope_freqs.weight"


class QuantizedBlocks(NamedTuple):
    """One matrix as the file holds it.

    Attributes:
        kind: the file's name for the quantisation, such as ``Q4_1``.
        data: [rows, bytes of a row] uint8, rows in the order of Hugging Face checkpoints.
    """

    kind: str
    data: NDArray[np.uint8]

    def values(self) -> Tensor:
        """The numbers that the blocks mean, in float32."""
        kind = gguf.GGMLQuantizationType[self.kind]
        return torch.from_numpy(gguf.quants.dequantize(self.data, kind).astype(np.float32))


class GGUFFile:
    """One memory-mapped file.

    Raises:
        UnsupportedModelError: its architecture is not Llama's.
    """

    def __init__(self, path: Path) -> None:
        self._reader = gguf.GGUFReader(path)
        architecture = self.text("general.architecture")
        if architecture != "llama":
            raise UnsupportedModelError(f"GGUF files of architecture {architecture!r}")

    def text(self, key: str) -> str:
        """A metadata string."""
        return str(self._value(key))

    def number(self, key: str) -> float:
        """A metadata number."""
        return float(self._value(key))

    def texts(self, key: str) -> list[str]:
        """A metadata list of strings."""
        return [str(item) for item in self._value(key)]

    def numbers(self, key: str) -> list[int]:
        """A metadata list of integers."""
        return [int(item) for item in self._value(key)]

    def _value(self, key: str) -> Any:  # noqa: ANN401 - typed by the public readers above
        field = self._reader.get_field(key)
        if field is None:
            raise WeightsMismatchError(f"the GGUF file has no {key!r}")
        return field.contents()

    def tensors(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
        """The wanted tensors in float32, under their Hugging Face names and in that layout.

        Args:
            is_wanted: asked with the Hugging Face name, before the tensor is decoded.

        Raises:
            WeightsMismatchError: a tensor has no place in a Llama model.
        """
        for name, tensor in self._named(is_wanted):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            yield name, torch.from_numpy(np.ascontiguousarray(self._reordered(name, values)))

    def blocks(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, QuantizedBlocks]]:
        """The wanted quantised matrices undecoded, under their Hugging Face names."""
        for name, tensor in self._named(is_wanted):
            if tensor.data.dtype == np.uint8:
                data = self._reordered(name, tensor.data)
                yield name, QuantizedBlocks(tensor.tensor_type.name, data)

    def _named(self, is_wanted: Callable[[str], bool]) -> Iterator[tuple[str, gguf.ReaderTensor]]:
        for tensor in self._reader.tensors:
            if tensor.name == _ROPE_TABLE:  # derived from the settings in config.json
                continue
            name = _hugging_face_name(tensor.name)
            if is_wanted(name):
                yield name, tensor

    def _reordered(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        """Undo llama.cpp's order of query and key rows."""
        if ".q_proj." in name:
            return _to_rotary_halves(rows, int(self.number("llama.attention.head_count")))
        if ".k_proj." in name:
            return _to_rotary_halves(rows, int(self.number("llama.attention.head_count_kv")))
        return rows


def _hugging_face_name(name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise WeightsMismatchError(f"tensor {name!r} has no place in a Llama model")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _to_rotary_halves(rows: NDArray[Any], num_heads: int) -> NDArray[Any]:
    """Undo the row order of llama.cpp, which rotates neighbours instead of halves."""
    paired = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return paired.swapaxes(1, 2).reshape(rows.shape)
