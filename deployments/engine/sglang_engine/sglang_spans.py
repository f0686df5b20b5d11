"""SGLang's own spans, in our traces: imported in its processes alone.

SGLang makes spans of a request with an exporter of its own, one for each of its processes. In its
place stands ours, so that the cluster's settings hold for all spans: exporter, sampling, and ids
that differ between processes. The request's trace context comes with it, see ``requests``.

    target.generate        the replica
      Req <rid>            SGLang's tokenizer process, which is the replica's actor
        Tokenizer ...      tokenize, api_server_dispatch
        Scheduler ...      request_process, prefill_waiting, prefill_forward, decode_forward
      draft.rounds         the scheduler, see ``draft_spans``
      kv.load              the scheduler's storage backend, see ``kv_store.spans``
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from sglang.srt.observability import trace as theirs
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from deployments.engine.sglang_engine.own_params import read_own_params
from deployments.engine.sglang_engine.page_owners import PageOwners

if TYPE_CHECKING:
    from collections.abc import Callable

    from deployments.engine.span_export import SpanExport

_SCHEDULER = "sglang.srt.managers.scheduler"
_owners = PageOwners()


def install_spans(export: SpanExport) -> None:
    """Have this process's spans sent like all others; SGLang applies the hooks."""
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(export.provider("paceline-sglang"))
    HookRegistry.register(
        "sglang.srt.observability.trace.process_tracing_init", use_our_provider, HookType.REPLACE
    )
    if _SCHEDULER not in sys.modules:
        # A process without one, which need not load it for our sake.
        return
    HookRegistry.register(f"{_SCHEDULER}.Scheduler._prefetch_kvcache", _remember, HookType.BEFORE)
    HookRegistry.register(
        "sglang.srt.managers.cache_controller.HiCacheController._page_transfer",
        _load_for,
        HookType.AROUND,
    )


def use_our_provider(*_: object, **__: object) -> None:
    """What SGLang does in ``process_tracing_init``, without an exporter."""
    # SGLang lacks these where one of its exporters is not installed, which it does not need here.
    theirs.Status, theirs.StatusCode = Status, StatusCode
    theirs._trace_context_propagator = TraceContextTextMapPropagator()  # noqa: SLF001
    theirs.tracer = trace.get_tracer("sglang")
    theirs.global_trace_modules = ["request"]
    theirs.opentelemetry_initialized = True


def _remember(_: object, req: Any, *__: object, **___: object) -> None:  # noqa: ANN401
    own = read_own_params(req.sampling_params.custom_params)
    if own is not None and own["traceparent"] is not None:
        _owners.remember(req.rid, own["traceparent"])


def _load_for(
    original: Callable[..., Any],
    controller: object,
    operation: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    with _owners.loading(operation.request_id):
        return original(controller, operation)
