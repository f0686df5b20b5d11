"""Compares the installed SGLang with what this package relies on, and names every difference.

``python -m deployments.engine.sglang_engine.self_check`` does it in SGLang's own environment.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

from deployments.engine.errors import EngineSetupError
from deployments.engine.sglang_engine.expectations import TELLING_PAGES, TRACING, Expectation

if TYPE_CHECKING:
    from collections.abc import Iterable

KNOWN_VERSION = "0.5.23"


EXPECTATIONS = (
    Expectation(
        "sglang.srt.entrypoints.engine:Engine.async_generate",
        parameters=(
            "input_ids",
            "sampling_params",
            "return_logprob",
            "logprob_start_len",
            "top_logprobs_num",
            "stream",
            "external_trace_header",
            "rid",
            "priority",
            "cache_salt",
        ),
    ),
    Expectation("sglang.srt.entrypoints.engine:Engine.shutdown"),
    Expectation(
        "sglang.srt.server_args:ServerArgs",
        fields=(
            "model_path",
            "device",
            "dtype",
            "context_length",
            "max_running_requests",
            "max_queued_requests",
            "max_total_tokens",
            "mem_fraction_static",
            "chunked_prefill_size",
            "disable_cuda_graph",
            "attention_backend",
            "tp_size",
            "enable_priority_scheduling",
            "schedule_low_priority_values_first",
            "incremental_streaming_output",
            "stream_interval",
            "grammar_backend",
            "constrained_json_whitespace_pattern",
            "sampling_backend",
            "enable_metrics",
        ),
    ),
    Expectation("sglang.srt.layers.sampler:register_sampler_backend"),
    Expectation(
        "sglang.srt.layers.sampler:Sampler.forward",
        parameters=(
            "logits_output",
            "sampling_info",
            "return_logprob",
            "top_logprobs_nums",
            "token_ids_logprobs",
            "positions",
            "logprob_logits",
        ),
    ),
    Expectation("sglang.srt.layers.sampler:Sampler._preprocess_logits"),
    Expectation("sglang.srt.layers.sampler:Sampler._sync_token_ids_across_tp"),
    Expectation("sglang.srt.layers.logprob_processor:OutputLogprobProcessor.compute_logprobs"),
    Expectation(
        "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new", parameters=("batch",)
    ),
    Expectation("sglang.srt.plugins.hook_registry:HookRegistry.register", parameters=("hook",)),
    Expectation(
        "sglang.srt.sampling.sampling_params:SamplingParams",
        fields=(
            "max_new_tokens",
            "stop_token_ids",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "ignore_eos",
            "logit_bias",
            "custom_params",
            "json_schema",
            "regex",
            "ebnf",
        ),
    ),
    Expectation(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager.abort_request", parameters=("rid",)
    ),
    Expectation("sglang.srt.managers.tokenizer_manager:TokenizerManager.auto_create_handle_loop"),
    Expectation(
        "sglang.srt.managers.load_snapshot:LoadSnapshot",
        fields=("num_running_reqs", "num_waiting_reqs", "max_total_num_tokens", "num_used_tokens"),
    ),
    Expectation("sglang.srt.utils.watchdog:SubprocessWatchdog.stop"),
)

SHARING = (
    Expectation(
        "sglang.srt.server_args:ServerArgs",
        fields=(
            "page_size",
            "enable_hierarchical_cache",
            "hicache_write_policy",
            "hicache_mem_layout",
            "hicache_io_backend",
            "hicache_storage_backend",
            "hicache_storage_backend_extra_config",
            "hicache_storage_prefetch_policy",
        ),
    ),
    Expectation(
        "sglang.srt.mem_cache.hicache_storage:HiCacheStorageConfig",
        fields=(
            "tp_rank",
            "tp_size",
            "pp_rank",
            "pp_size",
            "attn_cp_rank",
            "attn_cp_size",
            "is_mla_model",
            "enable_storage_metrics",
            "extra_config",
        ),
    ),
    *(
        Expectation(f"sglang.srt.mem_cache.hicache_storage:HiCacheStorage.{name}", parameters)
        for name, parameters in {
            "register_mem_pool_host": ("mem_pool_host",),
            "on_host_pools_registered": (),
            "batch_exists": ("keys", "extra_info"),
            "batch_get_v1": ("keys", "host_indices", "extra_info"),
            "batch_set_v1": ("keys", "host_indices", "extra_info"),
            "batch_exists_v2": ("keys", "pool_transfers", "extra_info"),
            "batch_get_v2": ("transfers", "extra_info"),
            "batch_set_v2": ("transfers", "extra_info"),
            "clear": (),
            "get_stats": (),
        }.items()
    ),
    Expectation("sglang.srt.mem_cache.hicache_storage:PoolTransferResult.empty"),
    Expectation(
        "sglang.srt.observability.metrics_collector:StorageMetrics",
        fields=("prefetch_pgs", "backup_pgs", "prefetch_bandwidth", "backup_bandwidth"),
    ),
    Expectation(
        "sglang.srt.mem_cache.storage.backend_factory:StorageBackendFactory._create_dynamic_backend",
        parameters=("backend_config", "storage_config", "mem_pool_host"),
    ),
    # The salt of a request begins the chain of hashes that names its pages.
    Expectation(
        "sglang.srt.mem_cache.utils:storage_namespace_seed", parameters=("extra_key", "cache_salt")
    ),
    Expectation(
        "sglang.srt.mem_cache.utils:get_storage_hash_str",
        parameters=("key", "prior_hash", "page_size"),
    ),
    Expectation(
        "sglang.srt.managers.tokenizer_manager:TokenizerManager.attach_hicache_storage",
        parameters=("hicache_storage_backend", "hicache_storage_backend_extra_config_json"),
    ),
    Expectation("sglang.srt.managers.tokenizer_manager:TokenizerManager.detach_hicache_storage"),
)
"""What sharing pages relies on beside ``EXPECTATIONS``; without it an engine serves on its own."""

DRAFTING = (
    Expectation(
        "sglang.srt.server_args:ServerArgs",
        fields=(
            "speculative_algorithm",
            "speculative_num_draft_tokens",
            "speculative_num_steps",
            "speculative_eagle_topk",
            "disable_overlap_schedule",
        ),
    ),
    Expectation(
        "sglang.srt.speculative.spec_info:SpeculativeAlgorithm.register",
        parameters=("name", "spec_class"),
    ),
    Expectation("sglang.srt.speculative.spec_info:SpeculativeAlgorithm.NGRAM"),
    Expectation("sglang.srt.speculative.spec_registry:CustomSpecAlgo.is_ngram"),
    Expectation("sglang.srt.speculative.spec_registry:CustomSpecAlgo.has_draft_kv"),
    Expectation(
        "sglang.srt.speculative.base_spec_worker:BaseSpecWorker.alloc_memory_pool",
        parameters=("memory_pool_config", "req_to_token_pool", "token_to_kv_pool_allocator"),
    ),
    Expectation(
        "sglang.srt.speculative.base_spec_worker:BaseSpecWorker.note_request_finished",
        parameters=("rid", "natural_stop"),
    ),
    Expectation(
        "sglang.srt.speculative.ngram_info:NgramVerifyInput",
        parameters=(
            "draft_token",
            "custom_mask",
            "positions",
            "retrieve_index",
            "retrieve_next_token",
            "retrieve_next_sibling",
            "draft_token_num",
            "new_seq_lens",
            "accept_tokens",
            "accept_lens",
        ),
    ),
    Expectation(
        "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",
        parameters=("batch", "pp_proxy_tensors", "is_verify"),
    ),
    Expectation("sglang.srt.managers.tp_worker:TpModelWorker.get_memory_pool"),
    Expectation(
        "sglang.srt.managers.utils:GenerationBatchResult",
        fields=(
            "logits_output",
            "next_token_ids",
            "can_run_cuda_graph",
            "accept_lens",
            "new_seq_lens",
            "next_draft_input",
            "speculative_num_draft_tokens",
        ),
    ),
    Expectation(
        "sglang.srt.managers.schedule_batch:ScheduleBatch",
        fields=(
            "reqs",
            "forward_mode",
            "input_ids",
            "seq_lens",
            "seq_lens_cpu",
            "out_cache_loc",
            "req_pool_indices",
            "req_to_token_pool",
            "sampling_info",
            "spec_info",
            "return_logprob",
            "has_grammar",
        ),
    ),
    Expectation(
        "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo",
        fields=("is_all_greedy", "logit_bias"),
    ),
    Expectation(
        "sglang.srt.layers.logprob_processor:compute_spec_logprobs",
        parameters=("batch", "logits_output", "predict", "accept_index"),
    ),
    Expectation(
        "sglang.srt.speculative.spec_utils:build_grammar_vocab_mask",
        parameters=("reqs", "tree", "sampling_info", "device", "barrier"),
    ),
    Expectation(
        "sglang.srt.speculative.spec_utils:GrammarTree.from_host",
        parameters=("retrieve_next_token", "retrieve_next_sibling", "draft_token"),
    ),
    Expectation("sglang.srt.model_executor.forward_batch_info:ForwardMode.TARGET_VERIFY"),
    Expectation("sglang.srt.runtime_context:get_spec"),
    Expectation("sglang.srt.runtime_context:get_device"),
    Expectation("sglang.srt.runtime_context:get_parallel"),
    Expectation("sglang.srt.distributed.parallel_state:GroupCoordinator.first_rank"),
    Expectation(
        "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.move_kv_cache",
        parameters=("tgt_loc", "src_loc"),
    ),
    Expectation("sglang.srt.utils.async_probe:sanitize_nan_logits"),
)
"""What verifying drafts of the pool needs beside ``EXPECTATIONS``; without it there are none."""


def differences(expectations: Iterable[Expectation] = EXPECTATIONS) -> list[str]:
    """What is missing, one line each; nothing where all is as expected."""
    return [line for expected in expectations for line in _differences(expected)]


def installed_version() -> str | None:
    """The version of SGLang in this environment, or None where there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def check_installed() -> None:
    """Import SGLang and compare it.

    Raises:
        EngineSetupError: it is not here, or differs; names every difference.
    """
    version = installed_version()
    if version is None:
        raise EngineSetupError(
            f"SGLang is not installed in {sys.prefix}; engine.sglang.python names the Python of "
            "an environment that holds it"
        )
    if found := differences():
        raise EngineSetupError(
            f"SGLang {version} is not the {KNOWN_VERSION} that is known: {'; '.join(found)}"
        )


def _differences(expected: Expectation) -> list[str]:
    module, _, path = expected.target.partition(":")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        return [f"{module} cannot be imported ({error})"]
    for name in path.split("."):
        if not hasattr(found, name):
            return [f"{expected.target} is missing"]
        found = getattr(found, name)
    lines = []
    if expected.parameters:
        has = inspect.signature(found).parameters
        lines += [
            f"{expected.target} takes no {name}" for name in expected.parameters if name not in has
        ]
    fields = _fields(found)
    lines += [
        f"{expected.target} has no field {name}" for name in expected.fields if name not in fields
    ]
    return lines


def _fields(record: Any) -> frozenset[str]:  # noqa: ANN401 - whatever SGLang has there
    """Field names of a msgspec, pydantic or data class."""
    kinds = ("__struct_fields__", "__dataclass_fields__", "__pydantic_fields__")
    return frozenset(name for kind in kinds for name in getattr(record, kind, ()))


def main() -> int:
    """Print the version, or what is wrong."""
    try:
        check_installed()
    except EngineSetupError as error:
        print(error)  # noqa: T201 - a command's answer
        return 1
    lacks = {
        "cannot verify drafts of the pool": differences(DRAFTING),
        "cannot share pages": differences(SHARING),
        "makes spans that cannot be joined to ours": differences(TRACING),
        "cannot tell routers of its pages": differences(TELLING_PAGES),
    }
    notes = [f"{what}: {'; '.join(found)}" for what, found in lacks.items() if found]
    print(", which ".join([f"SGLang {installed_version()}", *notes]))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
