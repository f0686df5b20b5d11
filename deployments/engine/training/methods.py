"""Kinds of drafts: what each needs of its target, and what it is before its first gradient step."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from deployments.engine.torch_engine.eagle3 import Eagle3Config
from deployments.engine.torch_engine.student import StudentWeights, cut_student
from deployments.engine.torch_engine.student_fitting import fit_connector
from deployments.engine.training.eagle3 import Rows
from deployments.engine.training.initial import feature_scale, random_head, start_from_target
from deployments.engine.training.step_costs import CONTEXT_TOKENS, decoding_step
from deployments.engine.training.student_model import StudentModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from deployments.engine.torch_engine.model_config import ModelConfig
    from deployments.engine.torch_engine.weights.loader import LoadedModel
    from deployments.engine.training.batches import FeatureText
    from deployments.engine.training.config import DraftTrainingConfig, StudentConfig
    from deployments.engine.training.draft_module import DraftModule

_START_SHARPNESS = 0.6
"""A closed-form student is surer of itself than it may be; training finds the rest."""


class Start(NamedTuple):
    """A draft that has not been trained.

    Attributes:
        draft: on the CPU, in float32.
        feature_scale: by which the features it reads are to be divided.
    """

    draft: DraftModule
    feature_scale: Tensor


class Method(Protocol):
    """One kind of draft for one target."""

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Layers (counted from 0) whose outputs are the features of a text."""

    @property
    def num_unrolls(self) -> int:
        """Steps that training has to unroll."""

    def start(
        self,
        loaded: LoadedModel,
        draft_token_ids: Tensor,
        texts: Callable[[], Iterable[FeatureText]],
    ) -> Start:
        """Make a draft.

        Args:
            loaded: the target.
            draft_token_ids: [d] ascending.
            texts: to fit on; some ten thousand positions.
        """

    def drafting_step(self, loaded: LoadedModel, draft_vocab_size: int) -> Callable[[int], object]:
        """Steps of such a draft over so many rows behind a context, for what they take.

        Args:
            loaded: the target, whose arithmetic they have.
            draft_vocab_size: tokens that can be drafted.
        """


class Eagle3Method:
    """A head that reads its target's features (``eagle3``)."""

    def __init__(self, config: DraftTrainingConfig, target: ModelConfig) -> None:
        size = min(config.run.draft_vocab_size, target.vocab_size)
        self._shape = Eagle3Config.for_target(target, size)
        self._run = config.run

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Three, as SpecForge chooses them."""
        return self._shape.aux_layers

    @property
    def num_unrolls(self) -> int:
        """As configured: a head reads its own output."""
        return self._run.objective.num_unrolls

    def start(
        self,
        loaded: LoadedModel,
        draft_token_ids: Tensor,
        texts: Callable[[], Iterable[FeatureText]],
    ) -> Start:
        """From the target in closed form, or random."""
        head = random_head(self._shape, draft_token_ids, self._run.seed)
        scale = feature_scale(texts())
        if self._run.start == "target":
            start_from_target(head, loaded.model, texts(), scale)
        return Start(head, scale)

    def drafting_step(self, loaded: LoadedModel, draft_vocab_size: int) -> Callable[[int], object]:
        """A head's rows see the context and themselves; what they guess from costs the same."""
        model, vocabulary = loaded.model, torch.arange(draft_vocab_size)
        shape = replace(self._shape, draft_vocab_size=draft_vocab_size)
        head = random_head(shape, vocabulary, seed=0).to(model.device, model.dtype).eval()
        size = (1, CONTEXT_TOKENS, shape.num_kv_heads, shape.head_dim)
        committed = torch.zeros(size, device=model.device, dtype=model.dtype)
        context = (Rows(committed, committed),)

        @torch.inference_mode()
        def step(num_rows: int) -> object:
            stream = torch.ones(
                (1, num_rows, shape.hidden_size), device=model.device, dtype=model.dtype
            )
            positions = torch.full((1, num_rows), CONTEXT_TOKENS, device=model.device)
            mask = torch.ones((num_rows, CONTEXT_TOKENS), dtype=torch.bool, device=model.device)
            output = head(stream, stream, positions, context, mask)
            return head.logits(output.hidden).argmax(-1).tolist()

        return step


class StudentMethod:
    """First and last layers of the target, trained on (``student_model``)."""

    def __init__(self, config: StudentConfig, target: ModelConfig) -> None:
        first, last = config.first_layers, config.last_layers
        if first + last >= target.num_layers:
            raise ValueError(
                f"a model of {target.num_layers} layers is no larger than its student of "
                f"{first} + {last}"
            )
        self._kept = (*range(first), *range(target.num_layers - last, target.num_layers))
        self._joint = first

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Those before and behind the layers that are left out; only the start needs them."""
        return (self._joint - 1, self._kept[self._joint] - 1)

    @property
    def num_unrolls(self) -> int:
        """One: a student reads tokens only, so further steps would say the same again."""
        return 1

    def start(
        self,
        loaded: LoadedModel,
        draft_token_ids: Tensor,
        texts: Callable[[], Iterable[FeatureText]],
    ) -> Start:
        """The target's own layers, with the connector in closed form."""
        rows = [(text.features.float(), text.is_answer) for text in texts()]
        features, is_answer = (torch.cat(parts) for parts in zip(*rows, strict=True))
        inputs, outputs = features.chunk(2, dim=1)
        weight, bias = fit_connector(inputs, outputs, is_answer)
        student = StudentWeights(
            connector_weight=weight,
            connector_bias=bias,
            draft_token_ids=draft_token_ids.int(),
            logit_scale=_START_SHARPNESS,
            kept_layers=self._kept,
            joint=self._joint,
            target_digest=loaded.weights_digest,
            num_positions=len(features),
            agreement=None,
        )
        draft = StudentModel.from_target(loaded.model, student)
        return Start(draft, torch.ones(features.shape[1]))

    def drafting_step(self, loaded: LoadedModel, draft_vocab_size: int) -> Callable[[int], object]:
        """Steps of the target's own layers; weights that are trained take as long."""
        size = loaded.config.hidden_size
        student = StudentWeights(
            connector_weight=torch.eye(size),
            connector_bias=torch.zeros(size),
            draft_token_ids=torch.arange(draft_vocab_size, dtype=torch.int32),
            logit_scale=1.0,
            kept_layers=self._kept,
            joint=self._joint,
            target_digest=loaded.weights_digest,
            num_positions=0,
            agreement=None,
        )
        return decoding_step(cut_student(loaded, student))


def method_of(config: DraftTrainingConfig, target: ModelConfig) -> Method:
    """The configured kind.

    Raises:
        ValueError: the target is too small for it, or cannot be cut as often as is configured.
        UnsupportedModelError: it cannot be made for this kind of target.
    """
    _check_division(config.tensor_parallel, target)
    if config.method == "student":
        return StudentMethod(config.student, target)
    return Eagle3Method(config, target)


def _check_division(tensor_parallel: int, target: ModelConfig) -> None:
    """Every process must get whole heads, and the same width."""
    widths = {
        "heads": target.num_heads,
        "key-value heads": target.num_kv_heads,
        "units of the feed-forward": target.intermediate_size,
    }
    wrong = [f"{count} {name}" for name, count in widths.items() if count % tensor_parallel]
    if wrong:
        raise ValueError(
            f"training.tensor_parallel: {tensor_parallel} does not divide the target's "
            f"{' and '.join(wrong)}"
        )
