"""From the cluster's settings to SGLang's server arguments."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from deployments.engine.errors import EngineSetupError
from deployments.engine.sglang_engine.plugin import SAMPLING_BACKEND, SPECULATIVE_ALGORITHM
from kv_store.layout import PAGE_TOKENS

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from deployments.engine.config import EngineConfig

_JSON_WHITESPACE = r"\n?[ ]{0,20}"
"""As the embedded engine allows it: a weak model may write white space for ever where it may."""
_DEFAULTS = {"enable_metrics": True}
"""What ``extra_args`` may say otherwise."""
_ALONE = ("dp_size", "pp_size")
"""Ways to spread a model whose schedulers do not run the same batches, or not as a whole."""
_KEPT_BACK = 8
"""SGLang lets no sequence have its last tokens: two of the context, and six more of a prompt."""


def server_args(
    config: EngineConfig,
    folder: Path,
    *,
    max_model_len: int,
    known: Collection[str],
    is_drafted: bool = False,
    tier: str | None = None,
    kv_events: str | None = None,
    is_traced: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of ``sglang.Engine``.

    Args:
        config: the engine's settings.
        folder: the model's files.
        max_model_len: prompt and output tokens of one sequence, at most.
        known: names of the installed SGLang's server arguments.
        is_drafted: whether drafts of the pool are verified.
        tier: configuration of the storage backend, where pages are shared.
        kv_events: configuration of what publishes its pages, where routers are told of them.
        is_traced: whether spans are sent, see ``sglang_spans``.

    Raises:
        EngineSetupError: ``engine.sglang.extra_args`` names an argument that does not exist, or
            that another setting decides.
    """
    own = _own(config, folder, max_model_len)
    if is_drafted:
        own |= _drafting(config)
    if tier is not None:
        own |= _hierarchical_cache(tier)
    if kv_events is not None:
        own["kv_events_config"] = kv_events
    if is_traced:
        own["enable_trace"] = True
    problems = []
    for name in config.sglang.extra_args:
        if name in own:
            problems.append(f"{name} is decided by other settings of the engine")
        elif name not in known:
            likely = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {likely[0]}?" if likely else ""
            problems.append(f"SGLang has no server argument {name}{hint}")
        elif is_drafted and name in _ALONE and config.sglang.extra_args[name] != 1:
            problems.append(f"{name} must be 1 with drafts of the pool")
    if problems:
        raise EngineSetupError(f"engine.sglang.extra_args: {'; '.join(problems)}")
    return _DEFAULTS | own | dict(config.sglang.extra_args)


def tells_pages(config: EngineConfig, *, has_tier: bool) -> bool:
    """Whether SGLang's pages are those that routers have names for, and nobody else reads them.

    Args:
        config: the engine's settings.
        has_tier: whether pages are shared.
    """
    own = config.sglang.extra_args
    return "kv_events_config" not in own and (has_tier or own.get("page_size") == PAGE_TOKENS)


def environment(config: EngineConfig, num_cpus: int) -> dict[str, str]:
    """Variables that SGLang reads when it is imported, here and in its processes.

    Args:
        config: the engine's settings.
        num_cpus: CPUs of this replica.
    """
    variables = {
        # Log probabilities of the model, and not of what temperature made of them.
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
        "OMP_NUM_THREADS": str(config.num_threads or num_cpus),
        # What SGLang keeps back comes on top of what the model can have.
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    }
    if config.device == "cpu":
        variables["SGLANG_USE_CPU_ENGINE"] = "1"
        # Compiling the first grammar's mask would take a minute, with no token for anybody.
        variables["TORCHDYNAMO_DISABLE"] = "1"
        if (num_ranks := config.sglang.tensor_parallel) > 1:
            each = max(1, num_cpus // num_ranks)
            variables["OMP_NUM_THREADS"] = str(config.num_threads or each)
            # SGLang asks for it; it binds threads only where it has its kernels for AMX.
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(
                f"{rank * each}-{(rank + 1) * each - 1}" for rank in range(num_ranks)
            )
    return variables


def _hierarchical_cache(tier: str) -> dict[str, Any]:
    """Pages go from the GPU to host memory, and from there to the tier, as soon as they are full.

    How large the host memory is may be said in ``extra_args``: ``hicache_ratio``, ``hicache_size``.
    """
    return {
        "page_size": PAGE_TOKENS,
        "enable_hierarchical_cache": True,
        "hicache_write_policy": "write_through",
        # All layers of a page's keys lie together, and all of its values.
        "hicache_mem_layout": "page_first_direct",
        "hicache_io_backend": "direct",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": tier,
        # A request goes on with what has come when its time is over.
        "hicache_storage_prefetch_policy": "timeout",
    }


def _own(config: EngineConfig, folder: Path, max_model_len: int) -> dict[str, Any]:
    own: dict[str, Any] = {
        "model_path": str(folder),
        "device": config.device,
        "dtype": config.dtype,
        "context_length": max_model_len + _KEPT_BACK,
        "max_running_requests": config.max_num_seqs,
        "max_queued_requests": config.max_waiting,
        "chunked_prefill_size": config.max_batch_tokens,
        "disable_cuda_graph": not config.cuda_graphs,
        "tp_size": config.sglang.tensor_parallel,
        # The seam's rule is that a lower number runs first.
        "enable_priority_scheduling": True,
        "schedule_low_priority_values_first": True,
        # Every message holds new tokens alone; otherwise a text of n tokens costs n squared.
        "incremental_streaming_output": True,
        "stream_interval": 1,
        # The library, and the forms it knows, are those of the embedded engine.
        "grammar_backend": "llguidance",
        "constrained_json_whitespace_pattern": _JSON_WHITESPACE,
        "sampling_backend": SAMPLING_BACKEND,
    }
    if config.sglang.memory_fraction is None:
        own["max_total_tokens"] = (config.num_pages + 1) * PAGE_TOKENS
    else:
        own["mem_fraction_static"] = config.sglang.memory_fraction
    if config.sglang.attention_backend is not None:
        own["attention_backend"] = config.sglang.attention_backend
    return own


def _drafting(config: EngineConfig) -> dict[str, Any]:
    num_draft_tokens = config.speculation.num_draft_tokens
    # With one branch SGLang takes a draft for a chain, whatever its mask says; how many there are
    # of more than one only tells it how many slots to keep free, of which a tree needs no more.
    num_branches = 2 if config.sglang.draft_trees else 1
    return {
        "speculative_algorithm": SPECULATIVE_ALGORITHM,
        # SGLang counts the last committed token as well.
        "speculative_num_draft_tokens": num_draft_tokens + 1,
        "speculative_num_steps": max(1, num_draft_tokens // num_branches),
        "speculative_eagle_topk": num_branches,
        # Every step starts from the tokens of the last one.
        "disable_overlap_schedule": True,
    }
