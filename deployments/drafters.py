"""Builds the drafter that a draft replica hosts. Heavy libraries are imported only then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.speculation.drafters.load import load_drafter

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.config import DraftPoolConfig
    from deployments.engine.config import EngineConfig
    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.torch_engine.weights.loader import LoadedModel

_STUDENT = "student"


def build_drafter(draft: DraftPoolConfig, engine: EngineConfig, cache_dir: Path) -> Drafter:
    """The configured drafter; may take seconds.

    Args:
        draft: which one.
        engine: the targets' engine; a student was fitted to its model.
        cache_dir: where models and students lie.

    Raises:
        WeightsMissingError: its files are not on this machine.
        DrafterLoadError: a drafter named by import path cannot be had.
    """
    if draft.drafter == _STUDENT:
        return _student(draft, engine.model, cache_dir)
    if draft.language_model is not None:
        return _language_model(draft, draft.language_model, cache_dir)
    return load_drafter(draft.drafter)


def _student(draft: DraftPoolConfig, target: str, cache_dir: Path) -> Drafter:
    from deployments.engine.torch_engine.student import load_student

    loaded = load_student(
        target,
        dtype=draft.dtype,
        device=draft.device,
        cache_dir=cache_dir,
        weights=draft.weights,
    )
    return _causal_lm_drafter(draft, loaded)


def _language_model(draft: DraftPoolConfig, name_or_path: str, cache_dir: Path) -> Drafter:
    from deployments.engine.torch_engine.weights.loader import load_model

    loaded = load_model(
        name_or_path,
        dtype=draft.dtype,
        device=draft.device,
        cache_dir=cache_dir,
        weights=draft.weights,
    )
    return _causal_lm_drafter(draft, loaded)


def _causal_lm_drafter(draft: DraftPoolConfig, loaded: LoadedModel) -> Drafter:
    import torch

    from deployments.engine.torch_engine.lm_drafter import CausalLMDrafter

    torch.set_num_threads(draft.num_threads)
    drafter = CausalLMDrafter(loaded, num_pages=draft.num_pages, max_sessions=draft.max_sessions)
    drafter.warm_up()
    return drafter
