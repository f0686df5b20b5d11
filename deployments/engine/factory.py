"""Builds the engine that a configuration asks for. Heavy libraries are imported only then."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deployments.engine.base import Engine
    from deployments.engine.config import EngineConfig
    from deployments.engine.span_export import SpanExport
    from deployments.engine.speculation.speculator import Speculator
    from kv_store.config import KVStoreConfig
    from kv_store.layout import PageLayout
    from kv_store.page_store import PageStore


def build_engine(
    config: EngineConfig,
    *,
    cache_dir: Path,
    page_store_factory: Callable[[PageLayout], PageStore] | None,
    speculator: Speculator,
    detokenize: Callable[[Sequence[int]], str],
    tokenizer_json: Callable[[], str] | None = None,
    kv: KVStoreConfig | None = None,
    spans: SpanExport | None = None,
) -> Engine:
    """Load the model and start the engine; takes seconds, blocks.

    Args:
        config: which model, and how much of everything.
        cache_dir: where fetched models lie.
        page_store_factory: makes the KV tier once the layout of the model's pages is known; the
            engine closes it. None keeps pages in this replica.
        speculator: where drafts come from; the engine shuts it down.
        detokenize: text of output tokens, for stop strings; called from the engine thread.
        tokenizer_json: the tokenizer as a ``tokenizer.json``, for structured output; called from
            any thread. Without it such requests are refused.
        kv: the KV tier of SGLang, which opens it in its own processes.
        spans: where these processes send their spans; None for nowhere.

    Raises:
        WeightsMissingError: the model, or its draft head, is not here and cannot be had.
        EngineError: the model cannot be run, or not deterministically where that is asked for.
    """
    from deployments.engine.torch_engine.weights.folders import find_model_folder

    if config.kind == "sglang":
        from deployments.engine.sglang_engine.start import start_sglang_engine
        from deployments.engine.torch_engine.weights.loader import weights_digest

        folder = find_model_folder(config.model, cache_dir)
        return start_sglang_engine(
            config,
            folder,
            detokenize=detokenize,
            speculator=speculator,
            kv=kv,
            model_digest=lambda: weights_digest(folder),
            spans=spans,
        )
    if config.kind == "simulated":
        from deployments.engine.simulated_engine.start import start_simulated_engine

        return start_simulated_engine(
            config,
            find_model_folder(config.model, cache_dir),
            page_store_factory=page_store_factory,
            speculator=speculator,
            detokenize=detokenize,
        )
    import torch

    from deployments.engine.torch_engine.assembly import EngineParts, start_engine
    from deployments.engine.torch_engine.cuda_graphs import cuda_graphs
    from deployments.engine.torch_engine.head_drafter import HeadDrafter
    from deployments.engine.torch_engine.kv_cache import KVCache
    from deployments.engine.torch_engine.model_runner import ModelRunner
    from deployments.engine.torch_engine.weights.eagle3 import load_head
    from deployments.engine.torch_engine.weights.loader import load_model, return_freed_memory

    # Whoever builds an engine without a pool around it has the process' CPUs to give.
    torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
    loaded = load_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        cache_dir=cache_dir,
        weights=config.weights,
    )
    head = None
    if config.speculation.enabled and config.speculation.head is not None:
        drafter = load_head(Path(config.speculation.head), loaded.model)
        head = HeadDrafter(drafter, loaded.model, config.num_pages)
        head.warm_up()
    max_context = config.context_length(loaded.config.max_positions)
    loaded.config.check_context(max_context)
    # One page more than the pool hands out: padding of recorded forwards writes there.
    memory = KVCache(
        loaded.config, config.num_pages + 1, dtype=loaded.model.dtype, device=config.device
    )
    graphs = None
    if config.cuda_graphs:
        speculation = config.speculation
        graphs = cuda_graphs(
            loaded.model,
            memory,
            max_num_seqs=config.max_num_seqs,
            num_draft_tokens=speculation.num_draft_tokens if speculation.enabled else 0,
            max_context=max_context,
            capture_layers=tuple(set(head.capture_layers)) if head is not None else (),
        )
    runner = ModelRunner(
        loaded.model,
        loaded.config,
        memory,
        is_deterministic=config.deterministic,
        graphs=graphs,
    )
    if runner.is_compiled:
        loaded.model.drop_dense()
    return_freed_memory()
    layout = loaded.page_layout(runner.arithmetic)
    runner.warm_up()
    parts = EngineParts(
        runner=runner,
        memory=memory,
        layout=layout,
        vocab_size=loaded.config.vocab_size,
        max_positions=loaded.config.max_positions,
        eos_token_ids=frozenset(loaded.config.eos_token_ids),
        store=page_store_factory(layout) if page_store_factory is not None else None,
        speculator=speculator,
        detokenize=detokenize,
        tokenizer_json=tokenizer_json,
        head=head,
    )
    return start_engine(config, parts)
