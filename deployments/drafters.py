"""Builds the drafter that a draft replica hosts. Heavy libraries are imported only then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.engine.speculation.drafters.load import load_drafter
from deployments.engine.speculation.errors import DrafterLoadError
from deployments.model_files import model_folder
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from pathlib import Path

    from deployments.config import DraftPoolConfig
    from deployments.engine.config import EngineConfig
    from deployments.engine.speculation.drafters.base import Drafter
    from deployments.engine.torch_engine.weights.loader import LoadedModel

STUDENT = "student"
"""The ``draft.drafter`` that was cut out of its target."""


def max_text_tokens(draft: DraftPoolConfig, engine: EngineConfig) -> int:
    """Tokens of the longest text that the configured drafter reads; a language model's has pages.

    Args:
        draft: which one.
        engine: the targets' engine.
    """
    is_named = draft.drafter != STUDENT and draft.language_model is None
    if is_named or engine.kind == "simulated":
        return draft.max_session_tokens
    return min(draft.max_session_tokens, draft.num_pages * PAGE_TOKENS)


def build_drafter(
    draft: DraftPoolConfig,
    engine: EngineConfig,
    cache_dir: Path,
    *,
    student_file: Path | None = None,
) -> Drafter:
    """The configured drafter; may take seconds.

    It fits the target: a student was cut from these very weights, a language model has the same
    vocabulary. A drafter named by import path has none; its rows are checked one by one. Drafts of
    a simulated target are simulated, whatever ``draft`` names.

    Args:
        draft: which one.
        engine: the targets' engine; a student was fitted to its model.
        cache_dir: where models and students lie.
        student_file: of a student other than the one in use.

    Raises:
        WeightsMissingError: its files are not on this machine.
        WeightsMismatchError: its files are damaged, or a student is another target's.
        DrafterLoadError: a drafter named by import path cannot be had, or a language model has
            another vocabulary than the target.
    """
    if engine.kind == "simulated":
        from deployments.engine.simulated_engine.drafter import SimulatedDrafter
        from deployments.engine.simulated_engine.text import read_text

        return SimulatedDrafter(engine.simulated, read_text(model_folder(engine.model, cache_dir)))
    if draft.drafter == STUDENT:
        return _student(draft, engine.model, cache_dir, student_file)
    if draft.language_model is not None:
        _check_vocabulary(draft.language_model, engine.model, cache_dir)
        return _language_model(draft, draft.language_model, cache_dir)
    return load_drafter(draft.drafter)


def _student(
    draft: DraftPoolConfig, target: str, cache_dir: Path, student_file: Path | None
) -> Drafter:
    from deployments.engine.torch_engine.student import load_student

    loaded = load_student(
        target,
        dtype=draft.dtype,
        device=draft.device,
        cache_dir=cache_dir,
        weights=draft.weights,
        student_file=student_file,
    )
    return _causal_lm_drafter(draft, loaded)


def _check_vocabulary(name_or_path: str, target: str, cache_dir: Path) -> None:
    from deployments.tokenizer import Tokenizer

    own, theirs = (Tokenizer.load(model_folder(name, cache_dir)) for name in (name_or_path, target))
    if own.vocab_digest() != theirs.vocab_digest():
        raise DrafterLoadError(
            f"{name_or_path} has another vocabulary than {target}: {own.vocab_size} tokens against "
            f"{theirs.vocab_size}, or others under the same ids"
        )


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
