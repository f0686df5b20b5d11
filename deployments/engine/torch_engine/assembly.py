"""Joins the engine's parts. The model is handed in, so tests run the very same engine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from deployments.engine.torch_engine.core import EngineCore
from deployments.engine.torch_engine.engine import TorchEngine
from deployments.engine.torch_engine.kv_transfer import KVTransfer
from deployments.engine.torch_engine.mailbox import Mailbox
from deployments.engine.torch_engine.page_pool import PagePool
from deployments.engine.torch_engine.scheduler import Scheduler
from deployments.engine.torch_engine.structure.compiler import StructureCompiler
from deployments.engine.validation import ModelLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.engine.config import TorchEngineConfig
    from deployments.engine.speculation.speculator import Speculator
    from deployments.engine.torch_engine.core import Runner
    from deployments.engine.torch_engine.head_drafter import HeadDrafter
    from deployments.engine.torch_engine.kv_transfer import PageMemory
    from kv_store.layout import PageLayout
    from kv_store.page_store import PageStore


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine is made of besides its configuration.

    Attributes:
        memory: the KV rows that ``runner`` writes to, ``config.num_pages`` pages.
        layout: of those pages.
        max_positions: the model's own context length.
        store: the KV tier, or None.
        detokenize: text of output tokens, for stop strings.
        head: drafts beside the model, or None.
        tokenizer_json: the tokenizer as a ``tokenizer.json``, for structured output.
    """

    runner: Runner
    memory: PageMemory
    layout: PageLayout
    vocab_size: int
    max_positions: int
    eos_token_ids: frozenset[int]
    store: PageStore | None
    speculator: Speculator
    detokenize: Callable[[Sequence[int]], str]
    tokenizer_json: Callable[[], str] | None = None
    head: HeadDrafter | None = None


def model_limits(config: TorchEngineConfig, parts: EngineParts) -> ModelLimits:
    """What one request may ask for."""
    return ModelLimits(
        vocab_size=parts.vocab_size,
        max_model_len=config.context_length(parts.max_positions),
        eos_token_ids=parts.eos_token_ids,
        num_layers=parts.layout.num_layers,
    )


def structure_compiler(parts: EngineParts) -> StructureCompiler:
    """What makes constraints for this engine's requests."""
    return StructureCompiler(
        parts.tokenizer_json, vocab_size=parts.vocab_size, eos_token_ids=parts.eos_token_ids
    )


def build_core(
    config: TorchEngineConfig,
    parts: EngineParts,
    *,
    wake: Callable[[], None],
    wall_clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
) -> EngineCore:
    """The engine without its thread.

    Args:
        config: sizes and budgets.
        parts: everything else.
        wake: called from any thread when a KV load has ended.
        wall_clock: seconds since the epoch, for deadlines.
        monotonic: seconds, for durations and time-outs.
    """
    head = parts.head
    pool = PagePool(config.num_pages, head.forget_page if head is not None else None)
    if head is not None:
        parts.speculator.add_head(head)
    return EngineCore(
        runner=parts.runner,
        memory=parts.memory,
        pool=pool,
        scheduler=Scheduler(
            pool,
            max_num_seqs=config.max_num_seqs,
            max_batch_tokens=config.max_batch_tokens,
            max_waiting=config.max_waiting,
            num_draft_tokens=(
                config.speculation.num_draft_tokens if config.speculation.enabled else 0
            ),
        ),
        transfer=KVTransfer(
            pool,
            parts.memory,
            parts.layout,
            parts.store,
            load_timeout_s=config.kv_load_timeout_s,
            monotonic=monotonic,
            wake=wake,
        ),
        speculator=parts.speculator,
        head=head,
        limits=model_limits(config, parts),
        detokenize=parts.detokenize,
        device=torch.device(config.device),
        wall_clock=wall_clock,
        monotonic=monotonic,
    )


def start_engine(config: TorchEngineConfig, parts: EngineParts) -> TorchEngine:
    """The whole engine, running."""
    mailbox = Mailbox(config.max_waiting + config.max_num_seqs)
    core = build_core(config, parts, wake=mailbox.wake)
    structures = structure_compiler(parts)
    limits = model_limits(config, parts)
    return TorchEngine(core, mailbox, limits, parts.speculator, parts.store, structures)
