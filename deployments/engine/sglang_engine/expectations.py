"""What is relied on of SGLang for being observed; ``self_check`` has the rest, and compares."""

from __future__ import annotations

from dataclasses import dataclass


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


TELLING_PAGES = (
    Expectation("sglang.srt.server_args:ServerArgs", fields=("kv_events_config",)),
    Expectation(
        "sglang.srt.disaggregation.kv_events:KVEventsConfig",
        fields=("publisher", "endpoint", "replay_endpoint", "buffer_steps"),
    ),
    Expectation(
        "sglang.srt.disaggregation.kv_events:BlockStored",
        fields=(
            "block_hashes",
            "parent_block_hash",
            "token_ids",
            "block_size",
            "medium",
            "cache_salt",
        ),
    ),
    Expectation(
        "sglang.srt.disaggregation.kv_events:BlockRemoved", fields=("block_hashes", "medium")
    ),
    Expectation("sglang.srt.disaggregation.kv_events:AllBlocksCleared"),
)
"""What telling routers of pages relies on; without it they know what they have sent."""

TRACING = (
    Expectation("sglang.srt.server_args:ServerArgs", fields=("enable_trace",)),
    Expectation(
        "sglang.srt.observability.trace:process_tracing_init",
        parameters=("otlp_endpoint", "server_name", "trace_modules"),
    ),
    Expectation("sglang.srt.observability.trace:tracer"),
    Expectation("sglang.srt.observability.trace:global_trace_modules"),
    Expectation("sglang.srt.observability.trace:opentelemetry_initialized"),
    Expectation("sglang.srt.observability.trace:_trace_context_propagator"),
    Expectation("sglang.srt.managers.scheduler:Scheduler._prefetch_kvcache", parameters=("req",)),
    Expectation(
        "sglang.srt.managers.cache_controller:HiCacheController._page_transfer",
        parameters=("operation",),
    ),
)
"""What joining its spans to ours relies on; without it there are only ours."""
