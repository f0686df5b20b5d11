"""Heads for the default model that take seconds to make."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from deployments.engine.config import DEFAULT_MODEL
from deployments.engine.torch_engine.eagle3 import Eagle3Config
from deployments.engine.torch_engine.weights.loader import load_model
from deployments.engine.training.capture import AnsweredPrompt, FeatureCapture
from deployments.engine.training.initial import (
    draft_vocabulary,
    feature_scale,
    random_head,
    start_from_target,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_DRAFT_VOCABULARY = 8192
_MAX_TOKENS = 512


def write_heads(
    cache_dir: Path, texts: Sequence[Sequence[int]], random: Path, fitted: Path
) -> None:
    """Write one that has learned nothing, and one that linear algebra fits to these texts."""
    loaded = load_model(DEFAULT_MODEL, dtype="float32", cache_dir=cache_dir)
    shape = Eagle3Config.for_target(loaded.config, _DRAFT_VOCABULARY)
    ids = draft_vocabulary(chain.from_iterable(texts), _DRAFT_VOCABULARY, shape.vocab_size)
    head = random_head(shape, ids, seed=1)
    head.save(random)
    capture = FeatureCapture(loaded, shape.aux_layers, max_length=_MAX_TOKENS)
    read = list(capture.texts(AnsweredPrompt(text, 1) for text in texts))
    scale = feature_scale(read)
    start_from_target(head, loaded.model, read, scale)
    head.rebuilt(head.state_dict(), scale).save(fitted)
