"""Finds a model's folder and fills the model with exactly its tensors."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import blake3
import torch

from deployments.engine.errors import (
    UnsupportedModelError,
    WeightsMismatchError,
    WeightsMissingError,
)
from deployments.engine.torch_engine.model_config import ModelConfig
from deployments.engine.torch_engine.models import model_class
from deployments.engine.torch_engine.weights.folders import find_model_folder
from deployments.engine.torch_engine.weights.gguf import GGUFFile
from deployments.engine.torch_engine.weights.packed import attach_blocks, file_blocks, quantised
from deployments.engine.torch_engine.weights.safetensors import read_safetensors, safetensors_files
from kv_store.layout import PageLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    from deployments.engine.torch_engine.models.llama import Model
    from deployments.engine.torch_engine.precision import DtypeName
    from deployments.engine.torch_engine.weights.gguf import QuantizedBlocks

WeightsForm = Literal["auto", "dense", "file", "int8", "int4"]
"""As ``TorchEngineConfig.weights``; ``auto`` is ``file`` on a CPU where the file has such blocks,
else ``dense``."""

_BITS = {"int8": 8, "int4": 4}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_ALWAYS_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run, and where it came from.

    Attributes:
        weights_digest: hex; differs whenever the files differ that decide the arithmetic, or what
            was made of their numbers.
        folder: holds the tokenizer's files as well.
        dtype: of weights, activations and KV rows.
    """

    model: Model
    config: ModelConfig
    weights_digest: str
    folder: Path
    dtype: DtypeName

    def page_layout(self, engine: str = "torch") -> PageLayout:
        """The layout of this model's KV pages.

        Args:
            engine: ``ModelRunner.arithmetic`` of whoever computes them.
        """
        return PageLayout(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            model_digest=self.weights_digest,
            rope=self.config.rope.canonical_text(),
            engine=engine,
        )


def default_cache_dir() -> Path:
    """Where fetched and derived files live unless a caller names another place."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "paceline"


def load_model(
    name_or_path: str,
    *,
    dtype: DtypeName,
    device: str = "cpu",
    cache_dir: Path,
    weights: WeightsForm = "dense",
) -> LoadedModel:
    """Build a model and fill it.

    Args:
        name_or_path: the built-in model's name, a folder, or a Hugging Face id.
        dtype: of weights, activations and KV rows.
        device: where it runs.
        cache_dir: Paceline's cache.
        weights: the form its matrices are kept in.

    Raises:
        WeightsMissingError: the files are not here and cannot be had.
        UnsupportedModelError: the model asks for something this engine does not compute.
        WeightsMismatchError: the files do not hold exactly the model's tensors.
    """
    folder = find_model_folder(name_or_path, cache_dir)
    config = ModelConfig.from_folder(folder)
    files = weight_files(folder)
    model = model_class(config.model_type)(config, dtype=torch_dtype(dtype), device=device)
    digest = weights_digest(folder)
    fill_from_files(model, files, weights)
    if weights in _BITS:
        digest = blake3.blake3(f"{digest} {weights}".encode()).hexdigest()
    return LoadedModel(
        model=model,
        config=config,
        weights_digest=digest,
        folder=folder,
        dtype=dtype,
    )


def return_freed_memory() -> None:
    """Give the system what loading used and nobody holds any more; the C library would keep it."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc has this call
        ctypes.CDLL(None).malloc_trim(0)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights.

    Raises:
        WeightsMissingError: there are none.
    """
    files = safetensors_files(folder) or sorted(folder.glob("*.gguf"))
    if not files:
        raise WeightsMissingError(f"{folder} holds no *.safetensors and no *.gguf file")
    return files


def read_tensors(
    files: list[Path], is_wanted: Callable[[str], bool] = lambda _: True
) -> Iterator[tuple[str, Tensor]]:
    """The files' tensors under their Hugging Face names; unwanted ones are not decoded."""
    for path in files:
        if path.suffix == ".gguf":
            yield from GGUFFile(path).tensors(is_wanted)
        else:
            yield from read_safetensors(path, is_wanted)


def fill_from_files(
    model: Model,
    files: list[Path],
    weights: WeightsForm,
    own_name: Callable[[str], str | None] = lambda name: name,
    replaced: Mapping[str, QuantizedBlocks] = MappingProxyType({}),
) -> dict[str, QuantizedBlocks]:
    """Fill a model and keep its matrices in the form asked for.

    Args:
        model: allocated.
        files: hold its tensors.
        weights: the form.
        own_name: the model's name for a tensor of the files; None for those it has no place for.
        replaced: tensors that the files do not hold, by the model's names.

    Returns:
        The blocks of its matrices by the model's names; none if they stay dense.

    Raises:
        UnsupportedModelError: the files have no blocks, or not of a kind that can be used.
        WeightsMismatchError: the files do not hold exactly the model's tensors.
    """

    def is_wanted(name: str) -> bool:
        return own_name(name) is not None

    blocks: dict[str, QuantizedBlocks] = {}
    tensors = chain(
        ((own_name(name) or name, tensor) for name, tensor in read_tensors(files, is_wanted)),
        ((name, found.values()) for name, found in replaced.items()),
    )
    if weights in _BITS:
        fill_model(model, quantised(tensors, _BITS[weights], blocks))
        attach_blocks(model, blocks.items())
        return blocks
    fill_model(model, tensors)
    if weights == "dense" or (weights == "auto" and model.device.type != "cpu"):
        return {}
    try:
        for name, found in file_blocks(files, is_wanted):
            blocks[own_name(name) or name] = found
        blocks |= {name: found for name, found in replaced.items() if found.data.ndim == 2}
        attach_blocks(model, blocks.items())
    except UnsupportedModelError:
        if weights != "auto":
            raise
        return {}
    return blocks


def fill_model(model: Model, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy every tensor to its place.

    Raises:
        WeightsMismatchError: a tensor is unknown, missing, given twice or of another shape.
    """
    targets = model.weight_targets()
    for name, tensor in tensors:
        if name.endswith(_ALWAYS_DERIVED):
            continue
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # some files store the tied head a second time
        target = targets.pop(name, None)
        if target is None:
            raise WeightsMismatchError(f"tensor {name!r} has no place in the model, or came twice")
        if target.shape != tensor.shape:
            raise WeightsMismatchError(
                f"tensor {name!r} is {tuple(tensor.shape)}, the model wants {tuple(target.shape)}"
            )
        target.copy_(tensor)
    if targets:
        raise WeightsMismatchError(
            f"{len(targets)} tensors are missing, the first is {min(targets)!r}"
        )


def torch_dtype(dtype: DtypeName) -> torch.dtype:
    """The dtype of that name."""
    return _DTYPES[dtype]


def weights_digest(folder: Path) -> str:
    """Hex digest of the files that decide a model's arithmetic.

    Raises:
        WeightsMissingError: the folder holds no weights.
    """
    total = blake3.blake3()
    for path in (folder / "config.json", *weight_files(folder)):
        one = blake3.blake3(max_threads=blake3.blake3.AUTO)
        one.update_mmap(path)
        total.update(one.digest())
    hexdigest: str = total.hexdigest()
    return hexdigest
