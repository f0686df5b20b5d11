"""A small draft model cut out of its target: first and last layers, joined by one linear map.

The connector takes the residual stream behind the kept first layers to the stream that enters the
kept last layers. ``student_fitting`` finds it in closed form; then embedding, head, norms and the
kept layers are the target's own and are not stored again. ``training.student_model`` trains
connector, kept layers and final norm further; a student's file holds these in eight bits (Q8_0).

Reading the head is most of a small model's step, so a student scores only its draft vocabulary: the
tokens its target writes most often (FR-Spec, arXiv:2502.14856). It never guesses any other.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import blake3
import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deployments.engine.errors import WeightsMismatchError, WeightsMissingError
from deployments.engine.torch_engine.connected import ConnectedLayer, DraftHead
from deployments.engine.torch_engine.model_config import ModelConfig
from deployments.engine.torch_engine.models import model_class
from deployments.engine.torch_engine.models.llama import Weight
from deployments.engine.torch_engine.weights.folders import find_model_folder
from deployments.engine.torch_engine.weights.gguf import QuantizedBlocks
from deployments.engine.torch_engine.weights.loader import (
    LoadedModel,
    fill_from_files,
    torch_dtype,
    weight_files,
    weights_digest,
)
from deployments.engine.torch_engine.weights.packed import pack_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from deployments.engine.torch_engine.models.llama import Model
    from deployments.engine.torch_engine.precision import DtypeName
    from deployments.engine.torch_engine.weights.loader import WeightsForm

_FORMAT = "paceline-student-1"
_FILE = "student.safetensors"
_SHIPPED = Path(__file__).parent / "data" / "students"
_WEIGHT, _BIAS, _VOCABULARY = "connector.weight", "connector.bias", "draft_token_ids"
_NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentWeights:
    """What turns a target into its student.

    Attributes:
        connector_weight: [E, E] float32, maps rows as ``x @ weight.T + bias``.
        connector_bias: [E] float32.
        draft_token_ids: [D] int32, ascending: the tokens it may guess.
        logit_scale: factor on the logits that makes the student as sure of itself as it may be.
        kept_layers: of the target, ascending.
        joint: how many of them come before the connector.
        target_digest: of the weights it was cut from.
        num_positions: rows it was fitted on.
        agreement: share of held-out answer positions where its top token is the target's; None
            where another measure says more, as after training.
        trained: what is no longer the target's, by the model's names: all tensors of the kept
            layers and the final norm, or nothing. Matrices are Q8_0 rows [rows, bytes] uint8,
            vectors float32.
    """

    connector_weight: Tensor
    connector_bias: Tensor
    draft_token_ids: Tensor
    logit_scale: float
    kept_layers: tuple[int, ...]
    joint: int
    target_digest: str
    num_positions: int
    agreement: float | None
    trained: Mapping[str, Tensor] = field(default_factory=dict)


def in_eight_bits(tensor: Tensor) -> Tensor:
    """A trained tensor as students' files hold it."""
    values = tensor.detach().float().cpu().contiguous()
    if values.ndim != 2:
        return values
    return torch.from_numpy(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0))


def student_path(cache_dir: Path, target_digest: str) -> Path:
    """Where a target's student lies once it was fitted."""
    return cache_dir / "students" / target_digest / _FILE


def shipped_student(target_digest: str) -> Path:
    """Where the student lies that comes with the package, for the few targets that have one."""
    return _SHIPPED / f"{target_digest}.safetensors"


def find_student(cache_dir: Path, target_digest: str) -> Path:
    """The student fitted here, else the one that comes with the package.

    Raises:
        WeightsMissingError: there is neither.
    """
    for path in (student_path(cache_dir, target_digest), shipped_student(target_digest)):
        if path.is_file():
            return path
    raise WeightsMissingError(
        f"no draft model in {cache_dir} was fitted to these weights; "
        "make one with: paceline train student"
    )


def save_student(student: StudentWeights, cache_dir: Path) -> Path:
    """Put a student where engines look for it."""
    return write_student(student, student_path(cache_dir, student.target_digest))


def write_student(student: StudentWeights, path: Path) -> Path:
    """Write a student's file; readers see the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    card = {
        "kept_layers": student.kept_layers,
        "joint": student.joint,
        "logit_scale": student.logit_scale,
        "target_digest": student.target_digest,
        "num_positions": student.num_positions,
        "agreement": student.agreement,
    }
    tensors = {
        _WEIGHT: student.connector_weight.contiguous(),
        _BIAS: student.connector_bias.contiguous(),
        _VOCABULARY: student.draft_token_ids.contiguous(),
        **student.trained,
    }
    handle, scratch = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        save_file(tensors, scratch, metadata={"format": _FORMAT, "card": json.dumps(card)})
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


def read_student(path: Path) -> StudentWeights:
    """Read a student's file.

    Raises:
        OSError: it is missing or cannot be read now, which says nothing of what it holds.
        WeightsMismatchError: it is damaged, or of another format, or lacks a tensor that the target
            could stand in for; what else is missing or unknown a loader finds.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise WeightsMismatchError(f"{path} is not a {_FORMAT} file")
            card = json.loads(metadata["card"])
            weight, bias = file.get_tensor(_WEIGHT), file.get_tensor(_BIAS)
            draft_token_ids = file.get_tensor(_VOCABULARY)
            others = set(file.keys()) - {_WEIGHT, _BIAS, _VOCABULARY}
            trained = {name: file.get_tensor(name) for name in sorted(others)}
        if trained and _NORM not in trained:
            raise WeightsMismatchError(f"{path} lacks {_NORM}")
        return StudentWeights(
            connector_weight=weight,
            connector_bias=bias,
            draft_token_ids=draft_token_ids,
            logit_scale=card["logit_scale"],
            kept_layers=tuple(card["kept_layers"]),
            joint=card["joint"],
            target_digest=card["target_digest"],
            num_positions=card["num_positions"],
            agreement=card["agreement"],
            trained=trained,
        )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WeightsMismatchError(f"{path} cannot be read: {error!r}") from error


def load_student(
    name_or_path: str,
    *,
    dtype: DtypeName,
    device: str = "cpu",
    cache_dir: Path,
    weights: WeightsForm = "dense",
    student_file: Path | None = None,
) -> LoadedModel:
    """Build a target's student; only the layers it keeps are read.

    Args:
        name_or_path: the target, as in ``load_model``.
        dtype: the student's own; it need not be the target's.
        device: where it runs.
        cache_dir: Paceline's cache.
        weights: as in ``load_model``.
        student_file: of the student; the one that ``find_student`` finds where it is None.

    Raises:
        WeightsMissingError: the target is not here, or has no student yet.
        OSError: the student's file cannot be read now.
        WeightsMismatchError: the student's file is damaged or belongs to another target, or to
            another vocabulary.
    """
    folder = find_model_folder(name_or_path, cache_dir)
    digest = weights_digest(folder)
    student = read_student(student_file or find_student(cache_dir, digest))
    if student.target_digest != digest:
        raise WeightsMismatchError(f"the student of {digest} was cut from {student.target_digest}")
    config = _student_config(ModelConfig.from_folder(folder), student)
    model = model_class(config.model_type)(config, dtype=torch_dtype(dtype), device=device)
    files = weight_files(folder)
    blocks = fill_from_files(
        model, files, weights, _student_names(student), dict(_trained_blocks(student))
    )
    _join(model, student)
    if blocks:
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        head = cast("DraftHead", model.lm_head)
        head.rows.packed = pack_rows(blocks[name], student.draft_token_ids.long().numpy())
    return _as_loaded(model, config, student, folder, dtype)


def cut_student(target: LoadedModel, student: StudentWeights) -> LoadedModel:
    """Build the student of a dense target that is in memory; the two share what is the same."""
    config = _student_config(target.config, student)
    model = model_class(config.model_type)(
        config, dtype=target.model.dtype, device=target.model.device
    )
    model.embed_tokens, model.lm_head = target.model.embed_tokens, target.model.lm_head
    model.norm.weight.copy_(target.model.norm.weight)
    places = model.weight_targets()
    for name, found in _trained_blocks(student):
        places[name].copy_(found.values())
    if not student.trained:
        for index, kept in enumerate(student.kept_layers):
            model.layers[index] = target.model.layers[kept]
    _join(model, student)
    return _as_loaded(model, config, student, target.folder, target.dtype)


def _student_config(target: ModelConfig, student: StudentWeights) -> ModelConfig:
    if student.connector_weight.shape != (target.hidden_size, target.hidden_size):
        raise WeightsMismatchError("the student's connector has another size than the target")
    vocabulary = student.draft_token_ids.long()
    if (
        not len(vocabulary)
        or bool((vocabulary.diff() <= 0).any())
        or not 0 <= int(vocabulary[0]) <= int(vocabulary[-1]) < target.vocab_size
    ):
        raise WeightsMismatchError(
            f"the student's draft vocabulary is no ascending part of the target's "
            f"{target.vocab_size} tokens"
        )
    layers = student.kept_layers
    if sorted(set(layers) & set(range(target.num_layers))) != list(layers):
        raise WeightsMismatchError(f"the target has no layers {layers} in this order")
    if not 0 <= student.joint < len(layers):
        raise WeightsMismatchError(f"no layer of {len(layers)} is behind joint {student.joint}")
    return replace(target, num_layers=len(student.kept_layers))


def _trained_blocks(student: StudentWeights) -> Iterator[tuple[str, QuantizedBlocks]]:
    for name, tensor in student.trained.items():
        kind = "Q8_0" if tensor.ndim == 2 else "F32"
        yield name, QuantizedBlocks(kind, tensor.numpy().view(np.uint8))


def _student_names(student: StudentWeights) -> Callable[[str], str | None]:
    """The student's name of each of the target's tensors; None for those it does not take."""
    kept: Sequence[int] = () if student.trained else student.kept_layers
    places = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}

    def student_name(name: str) -> str | None:
        if not name.startswith("model.layers."):
            return None if name in student.trained else name
        prefix = name[: name.index(".", len("model.layers.")) + 1]
        return places[prefix] + name[len(prefix) :] if prefix in places else None

    return student_name


def _join(model: Model, student: StudentWeights) -> None:
    """Put the connector before its layer, the logit scale into the final norm, and cut the head."""
    connector = Weight(*student.connector_weight.shape, has_bias=True)
    connector.load_state_dict({"weight": student.connector_weight, "bias": student.connector_bias})
    connector.to(dtype=model.dtype, device=model.device)
    model.layers[student.joint] = ConnectedLayer(connector, model.layers[student.joint])
    model.norm.weight.mul_(student.logit_scale)
    model.lm_head = DraftHead(model.lm_head.get_parameter("weight"), student.draft_token_ids)


def _as_loaded(
    model: Model, config: ModelConfig, student: StudentWeights, folder: Path, dtype: DtypeName
) -> LoadedModel:
    digest = blake3.blake3(student.target_digest.encode())
    own = (student.connector_weight, student.connector_bias, student.draft_token_ids)
    for tensor in (*own, *(tensor for _, tensor in sorted(student.trained.items()))):
        digest.update(tensor.contiguous().numpy().tobytes())
    digest.update(repr((student.kept_layers, student.joint, student.logit_scale)).encode())
    return LoadedModel(
        model=model, config=config, weights_digest=digest.hexdigest(), folder=folder, dtype=dtype
    )
