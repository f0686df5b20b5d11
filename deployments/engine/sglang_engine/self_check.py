"""Compares the installed SGLang with what this package relies on, and names every difference.

``python -m deployments.engine.sglang_engine.self_check`` does it in SGLang's own environment.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from deployments.engine.errors import EngineSetupError

if TYPE_CHECKING:
    from collections.abc import Iterable

KNOWN_VERSION = "0.5.23"


@dataclass(frozen=True, slots=True)
class Expectation:
    """One thing of SGLang's that is relied on.

    Attributes:
        target: ``module:name`` or ``module:Class.name``.
        parameters: that a call of it names.
        fields: that a record of it has.
    """

    target: str
    parameters: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()


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
        ),
    ),
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
            "sampling_seed",
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
    """Field names of a msgspec or data class."""
    kinds = ("__struct_fields__", "__dataclass_fields__")
    return frozenset(name for kind in kinds for name in getattr(record, kind, ()))


def main() -> int:
    """Print the version, or what is wrong."""
    try:
        check_installed()
    except EngineSetupError as error:
        print(error)  # noqa: T201 - a command's answer
        return 1
    differing = differences(SHARING)
    note = f"; pages cannot be shared: {'; '.join(differing)}" if differing else ""
    print(f"SGLang {installed_version()}{note}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
